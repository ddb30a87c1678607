"""``longctx eval`` as a user runs it: offline over a tiny checkpoint, at a real server, and ended early by whatever can
end it."""

import json
import math
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.cli.main import main
from longctx.evaluation import endpoint as endpoint_module
from longctx.evaluation.case import Cell
from longctx.evaluation.heat_map import draw_heat_map
from longctx.evaluation.record import make_text_record
from longctx.evaluation.summary import make_grids
from longctx.evaluation.tasks import TASKS
from longctx.evaluation.tasks.perplexity import Bucket
from longctx.models import demo_data
from tests.local_server import serve
from tests.longctx.evaluation.stub_endpoint import ERROR, complete, serve_stub
from tests.tiny_checkpoints import make_checkpoint

ENGINE = ("engine.kv_bytes=8MiB", "engine.num_threads=1", "eval.extra_tokens=4")
PROMPT_KEYS = {
    *("task", "length", "depth", "index", "seed", "score", "expected", "got", "answer", "num_tokens", "max_tokens"),
    *("finish_reason", "sha256", "buckets", "bits_per_byte"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "llama", max_position_embeddings=1792)


def run(output, *overrides, code=0):
    assert main(["eval", f"eval.output={output}", "eval.num_prompts=2", *overrides]) == code
    path = output / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run_offline(folder, output, *overrides, code=0):
    return run(output, f"model.path={folder}", *ENGINE, *overrides, code=code)


def run_stub(stub, output, *overrides, code=0):
    words = (f"eval.endpoint={stub.url}", "eval.chars_per_token=1", "eval.lengths=[600]", "eval.haystack=filler")
    return run(output, *words, *overrides, code=code)


def test_every_task_offline(folder, tmp_path, capsys):
    tasks, context = list(TASKS), 1792
    results = run_offline(folder, tmp_path, f"eval.tasks={tasks}", f"eval.lengths=[{context}]", "eval.depths=[0,100]")
    assert results["is_complete"] is True
    assert results["model"]["name"] == "tiny"
    assert results["model"]["chat"] is True
    assert results["style"] == "plain"
    assert results["settings"]["num_prompts"] == 2
    assert "api_key" not in results["settings"]
    assert set(results["versions"]) == {"longctx", "python", "torch", "transformers", "tokenizers"}
    prompts = results["prompts"]
    assert all(set(prompt) == PROMPT_KEYS for prompt in prompts)
    num_depths = {name: 2 if TASKS.get(name).has_depth else 1 for name in tasks}
    assert len(prompts) == sum(2 * count for count in num_depths.values())
    for prompt in prompts:
        # The answer takes its share of the context.
        assert context - prompt["max_tokens"] - 90 <= prompt["num_tokens"] <= context - prompt["max_tokens"]
        if prompt["task"] != "perplexity":
            assert 0 <= prompt["score"] <= 1
            assert len(prompt["answer"]) <= prompt["max_tokens"]
    for name in tasks:
        own = [prompt["score"] for prompt in prompts if prompt["task"] == name]
        cell = next(cell for cell in results["summary"] if cell["task"] == name)
        assert cell["num_prompts"] == len(own)
        if name != "perplexity":
            assert cell["overall"] == pytest.approx(sum(own) / len(own))
        picture = "".join(ElementTree.parse(tmp_path / f"{name}.svg").getroot().itertext())
        assert "1792" in picture
        assert "all" in picture
    output = capsys.readouterr().out
    assert re.search(r"passkey: score +0 % +100 % +all +prompts\n1792 tokens +0\.00", output)
    assert re.search(r"perplexity: perplexity +0-512 +512-1K +1K-2K +all", output)
    assert str(tmp_path / "results.json") in output


def test_perplexity_is_that_of_transformers(folder, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{index} is a number and {index * index} its square\n" for index in range(300)))
    overrides = ("eval.tasks=[perplexity]", "eval.lengths=[700]", f"eval.text={file}", "eval.num_prompts=1")
    (prompt,) = run_offline(folder, tmp_path / "out", *overrides)["prompts"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = file.read_text()
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    (ids,) = [
        demo_data.encode(text[start:])[:700]
        for start in starts
        if make_text_record(Cell("perplexity", 700, None, 0, 0), text[start : start + 764 + 350], FULL, 1).sha256
        == prompt["sha256"]
    ]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[:-1]
    nll = -logprobs.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    assert prompt["score"] == pytest.approx(float(nll.mean().exp()), rel=1e-3)
    assert prompt["bits_per_byte"] == pytest.approx(float(nll.mean()) / math.log(2), rel=1e-3)
    assert [bucket["nll"] for bucket in prompt["buckets"]] == pytest.approx(
        [float(nll[:511].sum()), float(nll[511:].sum())], rel=1e-3
    )


FULL = [Bucket(0, 512, 511, 1.0)]


@pytest.mark.parametrize("chat", ["true", "false"])
def test_an_endpoint_answers_as_the_model_itself(folder, tmp_path, chat):
    words = (
        "eval.tasks=[passkey,multi_threads]",
        "eval.lengths=[1400]",
        "eval.depths=[50]",
        f"eval.chat={chat}",
        "eval.extra_tokens=4",
    )
    here = run_offline(folder, tmp_path / "here", *words)
    with serve(folder) as server:
        there = run(tmp_path / "there", f"eval.endpoint={server.url}/v1", f"model.path={folder}", *words)
    by_key = [sorted(results["prompts"], key=lambda prompt: str(prompt)) for results in (here, there)]
    assert by_key[0] == by_key[1]
    assert there["model"]["endpoint"] == f"{server.url}/v1"
    assert there["model"]["name"] == "tiny"


def test_a_prompt_is_repeated_by_its_number(folder, tmp_path):
    words = ("eval.lengths=[1000]", "eval.depths=[0,50]", "eval.seed=3")
    many = run_offline(folder, tmp_path / "many", *words)["prompts"]
    one = ("eval.lengths=[1000]", "eval.depths=[50]", "eval.seed=3", "eval.first_prompt=1", "eval.num_prompts=1")
    (again,) = run_offline(folder, tmp_path / "one", *one)["prompts"]
    assert again == next(prompt for prompt in many if (prompt["depth"], prompt["index"]) == (50, 1))


def test_a_run_goes_on_with_what_the_folder_holds(folder, tmp_path, capsys):
    first = run_offline(folder, tmp_path, "eval.lengths=[800]", "eval.depths=[50]")
    assert main(["eval", f"eval.output={tmp_path}"]) == 2
    assert "holds results already: eval.resume=true" in capsys.readouterr().err
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(lines.read_text()[:-20])  # the process was killed while it wrote the last one
    more = ("eval.resume=true", "eval.lengths=[800,900]", "eval.depths=[50,100]")
    second = run_offline(folder, tmp_path, *more)
    assert len(second["prompts"]) == 8
    assert all(prompt in second["prompts"] for prompt in first["prompts"])
    run_offline(folder, tmp_path, *more, "eval.seed=5", code=2)
    assert "eval.seed=0, not 5" in capsys.readouterr().err
    run_offline(folder, tmp_path, *more, "eval.chat=false", code=2)
    assert "chat=True, not False" in capsys.readouterr().err
    lines.write_text("{}\n")
    run_offline(folder, tmp_path, *more, code=2)
    assert "is not what longctx eval writes" in capsys.readouterr().err


def test_an_endpoint_that_dies_is_named_and_what_it_answered_is_kept(tmp_path, capsys):
    with serve_stub() as stub:
        stub.reply = lambda number: complete(" 12345") if number <= 4 else (500, ERROR, {})
        results = run_stub(stub, tmp_path, "eval.concurrency=1", code=1)
        assert len(results["prompts"]) == 4
        assert results["is_complete"] is False
        said = capsys.readouterr().err
        assert f"{stub.url}/chat/completions answered 500: no room left" in said
        assert f"4 of 10 prompts are kept in {tmp_path}; eval.resume=true goes on" in said
        stub.reply = lambda number: complete(" 12345")
        stub.bodies.clear()
        assert len(run_stub(stub, tmp_path, "eval.resume=true")["prompts"]) == 10
        assert len(stub.bodies) == 6
    run_stub(stub, tmp_path, "eval.resume=true", code=2)
    assert f"eval.endpoint={stub.url} does not answer" in capsys.readouterr().err


def test_a_connection_that_is_lost_is_named(tmp_path, capsys):
    with serve_stub() as stub:
        stub.delay_s = 5.0
        run_stub(stub, tmp_path, "eval.timeout_s=0.2", code=1)
    assert f"{stub.url}/chat/completions does not answer: ReadTimeout" in capsys.readouterr().err


def test_a_busy_endpoint_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint_module, "RETRY_S", 0.01)
    with serve_stub() as stub:
        stub.reply = lambda number: (429, ERROR, {"Retry-After": "0"}) if number % 3 else complete("1")
        assert len(run_stub(stub, tmp_path, "eval.concurrency=1")["prompts"]) == 10


def test_what_an_endpoint_is_sent(tmp_path):
    with serve_stub() as stub:
        words = ("eval.depths=[0]", "eval.num_prompts=1", "eval.api_key=secret")
        (prompt,) = run_stub(stub, tmp_path / "a", *words, "eval.extra_tokens=5")["prompts"]
        run_stub(stub, tmp_path / "b", *words, "eval.chat=false", "eval.model=other")
    chat, text = stub.bodies
    assert (chat["path"], chat["model"], chat["temperature"]) == ("/v1/chat/completions", "stub", 0)
    assert chat["max_tokens"] == prompt["max_tokens"] == len(" The pass key is 12345.") + 5
    assert (text["path"], text["model"]) == ("/v1/completions", "other")
    assert text["prompt"].endswith("What is the pass key? The pass key is")
    assert [len(text["prompt"]), len(chat["messages"][0]["content"])] == pytest.approx([599, 599], abs=2)
    assert prompt["num_tokens"] == 7  # what the endpoint said
    assert stub.keys == ["Bearer secret"] * 2
    assert not any("secret" in file.read_text() for file in tmp_path.rglob("*.json*"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval.tasks=[passkey,pas]"], ["task 'pas' is unknown", "passkey"]),
        (["eval.tasks=[passkey,passkey]"], ["passkey comes twice"]),
        (["eval.tasks=[]"], ["at least one task"]),
        (["eval.lengths=[0]"], ["eval.lengths=[0]", "at least 1"]),
        (["eval.lengths=[100000]"], ["eval.lengths holds 100000", "demo takes at most 65536"]),
        (["eval.lengths=[500]", "model.max_context=400"], ["demo takes at most 400"]),
        (["eval.depths=[0,101]"], ["0 to 100 percent"]),
        (["eval.depths=[-1]"], ["0 to 100 percent"]),
        (["eval.text=/absent"], ["eval.text='/absent' cannot be read"]),
        (["eval.output=/proc/absent"], ["eval.output=/proc/absent cannot be written"]),
        (["eval.endpoint=http://127.0.0.1:9/v1"], ["eval.endpoint=http://127.0.0.1:9/v1 does not answer"]),
        (["eval.endpoint=nonsense"], ["eval.endpoint=nonsense"]),
        (["eval.endpoint=http://x/v1", "eval.tasks=[perplexity]"], ["eval.tasks holds perplexity", "without"]),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, overrides, words):
    monkeypatch.setattr("longctx.llm.LLM.__init__", lambda *_, **__: pytest.fail("a model is loaded"))
    assert main(["eval", f"eval.output={tmp_path}", *overrides]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval.lengths=[100]"], "eval.lengths holds 100, too short for passkey: its shortest prompt has"),
        (["eval.lengths=[6000]"], "eval.lengths holds 6000; stub takes at most 5000 tokens"),
        (["eval.model=absent"], "eval.model=absent is not served by"),
        (["eval.chars_per_token=null"], "serves stub: set model.path=DIR"),
    ],
)
def test_what_an_endpoint_cannot_do_is_named(tmp_path, capsys, overrides, words):
    with serve_stub() as stub:
        run_stub(stub, tmp_path, *overrides, code=2)
    assert words in capsys.readouterr().err


def wait_for_lines(path, count):
    deadline = time.monotonic() + 200
    while not path.exists() or len(path.read_text().splitlines()) <= count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def interrupt(output, *overrides, after):
    words = [sys.executable, "-m", "longctx.cli.main", "eval", f"eval.output={output}", *overrides]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for_lines(output / "prompts.jsonl", after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    results = json.loads((output / "results.json").read_text())
    assert results["is_complete"] is False
    assert after <= len(results["prompts"])
    assert re.search(rf"interrupted: {len(results['prompts'])} of \d+ prompts are kept in .*eval.resume=true", said)
    return results["prompts"]


def test_ctrl_c_keeps_what_was_measured(folder, tmp_path):
    words = (f"model.path={folder}", *ENGINE, "eval.lengths=[500]", "eval.depths=[50]", "eval.chat=false")
    kept = interrupt(tmp_path, *words, "eval.num_prompts=80", "eval.haystack=filler", after=2)
    assert len(kept) < 80
    count = len(kept) + 1
    prompts = run(tmp_path, *words, "eval.resume=true", "eval.haystack=filler", f"eval.num_prompts={count}")["prompts"]
    assert prompts[:-1] == kept
    assert len(prompts) == count


def test_ctrl_c_ends_requests_at_an_endpoint(tmp_path):
    with serve_stub() as stub:
        stub.delay_s = 0.3
        words = (f"eval.endpoint={stub.url}", "eval.chars_per_token=1", "eval.lengths=[600]", "eval.haystack=filler")
        assert len(interrupt(tmp_path, *words, "eval.num_prompts=60", after=2)) < 300


def test_a_heat_map_shows_every_value_and_leaves_gaps_grey():
    records = [
        make_text_record(
            Cell("perplexity", length, None, 0, 0),
            "",
            [Bucket(0, 512, 10, nll), *([Bucket(512, 1024, 10, 2 * nll)] if length > 512 else [])],
            10,
        )
        for length, nll in ((512, 10.0), (1024, 20.0))
    ]
    (grid,) = make_grids(records)
    assert grid.values[0] == pytest.approx((math.e, math.e**2))
    assert grid.values[1][0] is None
    picture = draw_heat_map(grid, "a < b")
    ElementTree.fromstring(picture)
    assert picture.count("#eeeeee") == 1
    assert ">2.718<" in picture
    assert "a &lt; b" in picture
