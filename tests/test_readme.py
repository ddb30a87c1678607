"""README's examples as they are written, against a ``longctx serve`` started as README says; only the port differs."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from longctx.cli.commands import COMMANDS
from longctx.cli.sweep import list_values
from longctx.config import compose
from parallel.registry import load
from tests.cli_server import launch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = {
    name: (language, code)
    for name, language, code in re.findall(r"<!-- test: (\w+) -->\n```(\w+)\n(.*?)```", README, re.S)
}
PORT = 8000  # in the examples
RUN = {"python": (sys.executable, "-c"), "bash": ("bash", "-ec")}
TIMEOUT_S = 1200.0  # 32,000 tokens took 200 s on two busy cores without AVX-512
DEFAULTS = ("engine.kv_bytes=256MiB", "engine.num_threads=null")  # in place of tests.cli_server.SMALL's
MIN_TOKENS = 30_000


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with launch(tmp_path_factory.mktemp("readme"), *DEFAULTS) as server:
        server.wait_until_ready()
        yield server


def run_block(name, folder, port=PORT):
    """What an example prints."""
    language, code = BLOCKS[name]
    done = subprocess.run(
        [*RUN[language], code.replace(f"127.0.0.1:{PORT}", f"127.0.0.1:{port}")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_marked_and_run():
    assert set(BLOCKS) == {"ask", "curl", "offline", "train"}
    assert README.count("```") == 2 * len(BLOCKS)


@pytest.mark.slow
def test_ask_about_a_document(server, tmp_path):
    answer, figures = run_block("ask", tmp_path, server.port).splitlines()
    assert answer.strip() == "48213."
    number = r"(\d+(?:\.\d+)?)"
    form = rf"{number} prompt tokens, TTFT {number} s, TPOT {number} ms, {number} MiB of KV shipped"
    found = re.fullmatch(form, figures)
    assert found, figures
    num_tokens, ttft, tpot, shipped = map(float, found.groups())
    assert num_tokens >= MIN_TOKENS
    assert ttft > 0
    assert tpot > 0
    whole = num_tokens * 4 * 2 * 2 * 64 * 2 / 2**20  # layers, K and V, KV heads, head size, bytes
    assert shipped == pytest.approx(whole, rel=0.01)  # whole pages: a little more


@pytest.mark.slow
def test_curl(server, tmp_path):
    completion = json.loads(run_block("curl", tmp_path, server.port))
    assert completion["usage"]["completion_tokens"] == len(completion["choices"][0]["text"].encode()) == 30


@pytest.mark.slow
def test_train(tmp_path):
    output = tmp_path / "run"
    command = BLOCKS["train"][1].replace(".venv/bin/longctx", f"{sys.executable} -m longctx.cli.main")
    done = subprocess.run(
        shlex.split(command.replace("runs/readme", str(output))),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stderr + done.stdout
    assert (output / "final" / "model.safetensors").exists()
    assert (output / "report.md").exists()


def test_offline(tmp_path):
    assert "return" in run_block("offline", tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_told(name):
    assert re.search(rf"^    longctx {name}\b", README, re.M)


def name_command(words, override):
    """Whose key ``override`` is: the line's command, that which it submits, or what README speaks of without saying."""
    if words[0] == "submit" and not override.startswith("submit."):
        words = words[1:]
    for count in (2, 1):
        if " ".join(words[:count]) in COMMANDS:
            return COMMANDS[" ".join(words[:count])]
    group = override.partition(".")[0]
    return COMMANDS[group if group in ("generate", "eval") else "serve"]


def test_every_override_that_is_told_exists():
    lines = re.findall(r"^    longctx (.+?)(?:  +#|$)", README, re.M) + re.findall(r"`([^`\n]+)`", README)
    told = [
        (shlex.split(line.removeprefix("longctx ")), word)
        for line in lines
        for word in shlex.split(line)
        if re.match(r"[a-z_.]+=", word) and word != "key=value"
    ]
    assert {"model.path=DIR", "transport=tcp", "generate.prompt_file=FILE"} <= {word for _, word in told}
    for words, word in told:
        command = name_command(words, word)
        for override in [word] if "-m" not in words else list_values(word):
            compose(load(command.root), command.config_name, [override])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/life_of_a_request.md"])
def test_every_file_that_is_told_exists(page):
    text = (ROOT / page).read_text()
    links = [path for path in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in path]
    named = re.findall(r"`((?:longctx|memory|parallel|cluster|configs|tests|benchmarks|docs)/[a-z0-9_/.]*)`", text)
    assert links or named
    for path in links:
        assert (ROOT / page).parent.joinpath(path).exists(), path
    for path in named:  # those with a NAME in capitals are to be written
        assert (ROOT / path).exists(), path


def test_every_name_that_is_told_is_in_its_file():
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    told = re.findall(r"`([\w.]+)` (?:of|in) `([a-z0-9_/]+\.py)`", text)
    told += [(name, file) for file, name in re.findall(r"`([a-z0-9_/]+\.py)`: (?:a line|the name) in `(\w+)`", text)]
    assert {"ATTENTION", "TRANSPORTS", "POLICIES", "CASES"} <= {name for name, _ in told}
    for name, file in told:
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", (ROOT / file).read_text()), (name, file)
