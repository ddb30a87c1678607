"""The command line as a user meets it: real processes, exit codes, and what may not be imported."""

import subprocess
import sys

import pytest

from longctx.cli.commands import COMMANDS
from longctx.cli.main import main
from longctx.config import list_keys
from parallel.registry import load

HEAVY = ("torch", "ray", "transformers")
PROBE = """
import sys
from longctx.cli.main import main
code = main(sys.argv[1:])
loaded = [name for name in ("torch", "ray", "transformers") if name in sys.modules]
print("loaded:", *loaded)
sys.exit(code)
"""


def probe(*arguments):
    """Exit code, standard output with the heavy modules that were loaded in its last line, standard error."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--help",), 0, [*COMMANDS, "key=value"]),
        (("serve", "--help"), 0, list(list_keys(load(COMMANDS["serve"].root)))),
        (("generate", "--help"), 0, ["generate.prompt_file", "engine.kv_bytes"]),
        (("--version",), 0, ["longctx 0."]),
        (("serv",), 2, ["serv", "did you mean serve"]),
        (("serve", "engine.kv_byte=1"), 2, ["engine.kv_bytes"]),
        (("serve", "server.port=x"), 2, ["server.port"]),
        (("serve", "--config-dir"), 2, ["--config-dir"]),
        (("generate",), 2, ["generate.prompt"]),
        (("generate", "generate.prompt=a", "model.path=/absent"), 2, ["/absent"]),
        (("eval", "--help"), 0, ["eval.tasks", "multi_threads", "eval.endpoint", "engine.kv_bytes"]),
        (("eval", "eval.tasks=[pass]"), 2, ["task 'pass' is unknown; allowed: common_words", "passkey"]),
        (("eval", "eval.lengths=[1048576]"), 2, ["eval.lengths holds 1048576; demo takes at most 65536 tokens"]),
        (("serve", "model.path=/absent"), 2, ["/absent"]),
        (("train", "--help"), 0, ["experiment=NAME", "context_extension", "deepspeed.zero_stage", "--multirun"]),
        (("train", "--cfg", "job", "parallel=mixed"), 0, ["dp_degree: 2  # groups of ranks", "seed: 0"]),
        (("train", "--cfg", "all"), 2, ["--cfg all is not allowed; allowed: job"]),
        (
            ("train", "experiment=absent"),
            2,
            ["experiment=absent", "allowed for experiment: cca_demo, "],
        ),
        (("train", "parallel=mixed"), 2, ["train.batch_size=1", "parallel.dp_degree=2", "a batch of 2 would fit"]),
        (
            ("train", "data.path=README.md", "cluster.cpus_per_rank=9999"),
            2,
            ["cluster.cpus_per_rank=", "this machine has"],
        ),
        (("train", "cluster=processes", "cluster.address=auto"), 2, ["cluster.address=auto", "cluster.launcher=ray"]),
        (("train", "-m", "train.seed=1"), 2, ["there is none"]),
        (("train", "-m", "optimizer.lr=1e-4,x"), 2, ["optimizer.lr='x' is not allowed"]),
        (
            ("train", "data.path=README.md", "cluster=processes", "output=/proc/absent/out"),
            2,
            ["out cannot be written"],
        ),
        (("serve", "-m", "server.port=1,2"), 2, ["-m is not for serve; allowed for: train"]),
        (("serve", "--cfg", "job"), 0, ["num_prefill_workers: 1  # actors"]),
        (("serve", "model.adapter=/absent"), 2, ["/absent: no such folder", "adapter_config.json"]),
        (("generate", "generate.prompt=a", "model.adapter=longctx/models/demo"), 2, ["it is a model (config.json)"]),
        (("keys", "--help"), 0, ["keys add", "keys remove", "keys list"]),
        (("keys", "add"), 2, ["name=null is not allowed: up to 64 letters"]),
        (("keys", "add", "name=a"), 2, ["server.api_key_file=null is not allowed"]),
        (("keys", "remove", "name=a", "server.api_key_file=/absent/keys"), 2, ["no such file"]),
        (("keys", "list", "server.api_key_file=/absent/keys"), 2, ["/absent/keys", "cannot be read"]),
        (("status", "server.tls_ca=/absent"), 2, ["server.tls_ca='/absent' is not allowed"]),
        (("plan", "--help"), 0, ["plan train", "plan links", "key=value"]),
        (("plan",), 2, ["'plan' is unknown", "allowed: plan train, plan serve, plan cluster, plan attention"]),
        (("plan", "atention"), 2, ["'plan atention' is unknown", "did you mean plan attention?"]),
        (("plan", "train", "--help"), 0, ["machine.memory", "deepspeed.zero_stage", "experiment=NAME"]),
        (("plan", "train", "train.batch_size=3", "parallel=mixed"), 2, ["train.batch_size=3", "dp_degree=2"]),
        (("plan", "serve", "--help"), 0, ["machine.memory", "engine.kv_bytes"]),
        (("plan", "serve", "model.path=/absent"), 2, ["/absent"]),
        (("plan", "attention", "--help"), 0, ["num_cached_tokens", "links.bytes_per_s"]),
        (("plan", "attention", "num_tokens=512"), 0, ["step by step", "token_ring", "auto takes"]),
        (("plan", "attention", "plan=ring"), 2, ["plan='ring' is not allowed", "kv_ring"]),
        (("plan", "attention", "documents=[3,x]"), 2, ["documents=[3, 'x'] is not allowed", "a list of whole numbers"]),
        (("plan", "attention", "links.topology=ring"), 2, ["links.topology='ring' is not allowed", "switch, mesh"]),
        (("plan", "cluster", "fleet.decode=[nothing:2]"), 2, ["'nothing'", "llama2-70b-dgx-h100"]),
        (("bench", "bench.file=x"), 2, ["bench.file=x is not allowed"]),
        (("worker", "add"), 2, ["ray.address is missing"]),
        (("worker", "drain"), 2, ["name is missing"]),
        (("plan", "links", "world_size=1"), 2, ["world_size=1 is not allowed: at least 2"]),
        (("plan", "links", "file=/absent/links.json"), 2, ["there is no folder /absent"]),
    ],
)
def test_answers_without_loading_anything_heavy(arguments, code, words):
    got, output, errors = probe(*arguments)
    assert got == code, errors
    text = output if code == 0 else errors
    for word in words:
        assert word in text
    assert "Traceback" not in errors
    assert output.splitlines()[-1] == "loaded:"


def test_importing_longctx_loads_neither_torch_nor_ray():
    script = "import sys, longctx; assert not {'torch', 'ray', 'transformers', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_generate_prints_text_and_figures(capsys, tmp_path):
    document = tmp_path / "document.txt"
    document.write_text("import os\n" * 20 + "The pass key is 48213. Remember it.\n" + "import sys\n" * 20)
    arguments = [f"generate.prompt_file={document}", "generate.prompt=What is the pass key?", "engine.kv_bytes=64MiB"]
    assert main(["generate", *arguments, "generate.max_tokens=40", "model.max_context=4096"]) == 0
    output, errors = capsys.readouterr()
    assert "48213" in output
    assert "prompt tokens" in errors


def test_traceback_on_demand(capsys):
    assert main(["serve", "--traceback", "nonsense=1"]) == 2
    assert "Traceback" in capsys.readouterr().err
