"""Traces of single steps: operators and, on the same clock, what attention computes and carries."""

import gzip
import json
import time

import torch

from longctx.training.step_trace import trace_step


def test_only_the_steps_that_were_asked_for(tmp_path):
    with trace_step(3, [2, 4], tmp_path, global_rank=0) as folder:
        assert folder is None
    assert list(tmp_path.iterdir()) == []


def test_operators_and_exchange_are_on_one_clock(tmp_path):
    with trace_step(4, [4], tmp_path, global_rank=1) as folder:
        assert folder is not None
        a = torch.ones(64, 64)
        begun = time.time_ns()
        a @ a
        duration = time.time_ns() - begun
        event = {
            "name": "attend 8 x 8",
            "ph": "X",
            "pid": 1,
            "tid": "compute",
            "ts": begun / 1e3,
            "dur": duration / 1e3,
        }
        folder.mkdir()
        name = {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "rank 1"}}
        (folder / "rank-1.json").write_text("[\n" + json.dumps(name) + ",\n" + json.dumps(event) + ",\n")
    (path,) = (tmp_path / "trace").iterdir()
    assert path.name == "step-4-rank-1.json.gz"
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    (product,) = [each for each in events if each.get("name") == "aten::mm"]
    (tile,) = [each for each in events if each.get("name") == "attend 8 x 8"]
    assert tile["ts"] - 1 <= product["ts"] <= product["ts"] + product["dur"] <= tile["ts"] + tile["dur"] + 1


def test_a_step_that_fails_leaves_no_folder_behind(tmp_path):
    try:
        with trace_step(1, [1], tmp_path, global_rank=0) as folder:
            assert folder is not None
            folder.mkdir()
            raise ValueError
    except ValueError:
        pass
    assert not any(each.name.startswith(".") for each in (tmp_path / "trace").iterdir())
