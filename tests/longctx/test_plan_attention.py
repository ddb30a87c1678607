"""``longctx plan attention``: what it prints and draws, and which numbers it refuses."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from longctx.cli.main import main
from parallel.links import LinkModel
from parallel.plans import PLANS

SMALL = ("plan", "attention", "num_tokens=512", "num_heads=8", "num_kv_heads=2", "head_dim=64", "dtype=float32")
SVG = "{http://www.w3.org/2000/svg}"


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main([*SMALL, *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_plan_is_compared(capsys):
    code, output, _ = run(capsys, "steps=false")
    assert code == 0
    rows = {
        line.split()[0]: line.split()[1:]
        for line in output.splitlines()
        if line.split()[:1] and line.split()[0] in PLANS
    }
    assert set(rows) == set(PLANS)
    sent = {name: float(row[4]) for name, row in rows.items()}
    assert sent["kv_ring"] >= sent["fewest_bytes"] > 0
    assert sent["token_ring"] > 2 * sent["kv_ring"]


def test_a_plan_step_by_step(capsys):
    code, output, _ = run(capsys, "plan=token_ring", "world_size=2", "backward=false", "causal=false")
    assert code == 0
    table = output.partition("token_ring, step by step:\n\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split(maxsplit=2)[:2] for line in table[1:]] == [
        ["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"], ["2", "0"], ["2", "1"], ["3", "0"], ["3", "1"],
    ]  # fmt: skip
    # 256 queries of 8 heads x 64 floats; the output comes back with one log-sum-exp a row and head
    halves = r"q0\[heads 0:4\] -> 1 \(0\.262 MB\), q0\[heads 4:8\] -> 1 \(0\.262 MB\)"
    assert re.fullmatch(rf"0\s+0\s+q0 x kv0\[heads 0:4\]\s+{halves}", table[1])
    assert re.fullmatch(r"1\s+0\s+q1 x kv0\[heads 0:4\]\s+-", table[3])
    assert re.fullmatch(r"2\s+0\s+q1 x kv0\[heads 4:8\]\s+out1\[heads 0:4\] -> 1 \(0\.266 MB\)", table[5])
    assert re.fullmatch(r"3\s+0\s+q0 x kv0\[heads 4:8\]\s+out1\[heads 4:8\] -> 1 \(0\.266 MB\)", table[7])


@pytest.mark.parametrize("world_size", [1, 4, 12])
def test_the_picture_shows_what_every_rank_does(capsys, tmp_path, world_size):
    path = tmp_path / "plan.svg"
    code, output, _ = run(capsys, f"world_size={world_size}", f"picture={path}", "plan=kv_direct")
    assert code == 0
    assert f"timeline: {path}" in output
    drawing = ElementTree.parse(path).getroot()
    tips = [title.text or "" for title in drawing.iter(f"{SVG}title")]
    assert sum("computes" in tip for tip in tips) == 2 * world_size**2  # forward and backward
    assert any(" kv to " in tip for tip in tips) == (world_size > 1)
    words = [text.text or "" for text in drawing.iter(f"{SVG}text")]
    assert {"kv_direct, forward", "kv_direct, backward"} <= set(words)
    assert all(any(word.startswith(name) for word in words) for name in PLANS)
    assert f"rank {world_size - 1}" in words


def test_measured_links_replace_the_others(capsys, tmp_path):
    path = tmp_path / "links.json"
    LinkModel("mesh", bytes_per_s=1e6, latency_s=1e-3, flops_per_s=1e9).save(path)
    code, output, _ = run(capsys, f"links_file={path}", "steps=false")
    assert code == 0
    assert "links: mesh, 0.001 GB/s, 1000 us; attention at 0.001 TFLOP/s a rank" in output


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("num_heads=7",), "7 query heads and 2 KV heads are not allowed"),
        (("documents=[100,100]",), "documents=[100, 100] are 200 tokens; num_cached_tokens + num_tokens = 512"),
        (("plan=hybrid", "world_size=3", "num_nodes=2"), "3 ranks on 2 nodes"),
        (("causal=false", "window=4"), "window with causal=False is not allowed"),
        (("picture=plan.png",), "picture=plan.png is not allowed: a file NAME.svg"),
        (("picture=/absent/plan.svg",), "picture=/absent/plan.svg cannot be written"),
        (("links_file=/absent",), "/absent cannot be read as a link model"),
    ],
)
def test_mistakes_are_named(capsys, words, reason):
    code, output, errors = run(capsys, *words)
    assert (code, output) == (2, "")
    assert reason in errors
