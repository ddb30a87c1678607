"""The GPU benchmark computes what it says: on a CPU its tiles, merged, are the unsharded kernel's output."""

import json
import sys

import pytest

from benchmarks import sequence_parallel_gpu


@pytest.mark.parametrize("plan", ["kv_ring", "token_ring"])
def test_tiles_and_merges_are_the_whole(plan, monkeypatch, capsys):
    words = "--device cpu --dtype float32 --tokens 200 --documents 5 --heads 4 --kv-heads 2 --head-dim 16 --rounds 1"
    monkeypatch.setattr(sys, "argv", ["", *words.split(), "--world-sizes", "1", "3", "--plans", plan])
    sequence_parallel_gpu.main()
    content = json.loads(capsys.readouterr().out)
    assert [(cell["mask"], cell["world_size"]) for cell in content["cells"]] == [
        ("causal", 1),
        ("causal", 3),
        ("packed", 1),
        ("packed", 3),
    ]
    for cell in content["cells"]:
        assert cell["error"] <= 1e-6 and cell["num_documents"] == (5 if cell["mask"] == "packed" else 1)
        assert cell["ratio"] > 0 and 0 < cell["merge_share"] < 1
    assert content["kernel"] == "CpuFlash" and "commit" in content and content["hardware"]["num_cores"]
