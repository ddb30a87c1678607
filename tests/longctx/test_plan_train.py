"""``longctx plan train``: what it prints, and says where something does not fit."""

import re

import pytest

from longctx.cli.main import main

MACHINE = ("machine.peak_flops=1e12", "machine.bytes_per_s=2e10", "model.dtype=bfloat16")


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main([*words, *MACHINE])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_that_fits(capsys):
    code, output, _ = run(capsys, "plan", "train", "train.context_length=4096", "machine.memory=4GiB")
    assert code == 0
    assert "demo (3,018,496 weights, bfloat16, training every weight) on 1 x 1 ranks (cpu), ZeRO 1" in output
    sizes = {line.split()[0]: float(line.split()[1]) for line in output.splitlines() if line.endswith(" GiB")}
    assert sizes["total"] == pytest.approx(sum(sizes.values()) - sizes["total"], abs=0.005)
    assert "fits into 4.0 GiB" in output
    assert re.search(r"a step takes [\d.e-]+ s:", output)
    assert re.search(r"the longest context that fits is [\d,]{7,} tokens", output)
    assert "what would fit" not in output


def test_a_run_that_does_not_fit_and_what_would(capsys):
    words = ("plan", "train", "train.context_length=65536", "train.activation_checkpointing=false")
    code, output, _ = run(capsys, *words, "machine.memory=2GiB")
    assert code == 1
    assert "does not fit into 2.0 GiB" in output
    (advice,) = [line for line in output.splitlines() if line.startswith("what would fit: ")]
    changes = advice.removeprefix("what would fit: ").split()
    assert "train.activation_checkpointing=true" in changes
    assert run(capsys, *words[:3], *changes, "machine.memory=2GiB")[0] == 0


def test_the_longest_context_is_the_longest(capsys):
    words = ("plan", "train", "machine.memory=1GiB", "model.rope_theta=5e6")
    output = run(capsys, *words)[1]
    (longest,) = (int(text.replace(",", "")) for text in re.findall(r"fits is ([\d,]+) tokens", output))
    assert run(capsys, *words, f"train.context_length={longest}")[0] == 0
    assert run(capsys, *words, f"train.context_length={longest + 1024}")[0] == 1


def test_a_gpu_that_is_not_here_is_described(capsys):
    words = ("plan", "train", "model.device=cuda", "deepspeed.offload_optimizer=true", "machine.memory=80GiB")
    code, output, _ = run(capsys, *words)
    assert code == 0
    assert "of the host's memory for each rank" in output
    code, _, errors = run(capsys, *words[:-1])
    assert code == 2
    assert "machine.memory=null is not allowed with model.device=cuda" in errors


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("parallel.plan=hybrid", "parallel.sp_degree=3", "machine.num_nodes=2"), "3 ranks on 2 nodes"),
        (("train.batch_size=3", "parallel.dp_degree=2"), "train.batch_size=3 is not allowed"),
        (("model.path=/absent",), "/absent: no such folder"),
    ],
)
def test_mistakes_are_named(capsys, words, reason):
    code, output, errors = run(capsys, "plan", "train", "machine.memory=4GiB", *words)
    assert (code, output) == (2, "")
    assert reason in errors
