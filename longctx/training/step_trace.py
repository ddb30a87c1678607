"""What one rank does in single steps, for Perfetto's viewer: operators and kernels, and what attention exchanges.

``torch.profiler`` records the operators; on a CPU, ``parallel/trace.py`` records tiles and messages, which are added to
the same file on the same clock.
"""

import gzip
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

FOLDER_NAME = "trace"


@contextmanager
def trace_step(step: int, steps: list[int], output: Path, *, global_rank: int) -> Iterator[Path | None]:
    """Record a step if it is one of ``steps``, into ``output/trace/step-S-rank-R.json.gz``.

    Args:
        step: the one that begins.
        steps: those to record.
        output: the run's folder.
        global_rank: this rank.

    Yields:
        The folder for the traces of ``sequence_parallel_attention``; None where nothing is recorded.
    """
    if step not in steps:
        yield None
        return
    path = output / FOLDER_NAME / f"step-{step}-rank-{global_rank}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".step-{step}-rank-{global_rank}")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    try:
        with profile(activities=activities, record_shapes=True) as profiler:
            yield folder
        profiler.export_chrome_trace(str(path))
        _join(path, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _join(path: Path, folder: Path) -> None:
    """Add to the profiler's file the exchange traces of ``folder``."""
    files = sorted(folder.glob("rank-*.json"))
    if not files:
        return
    with gzip.open(path, "rt", encoding="utf-8") as file:
        content = json.load(file)
    base_us = content["baseTimeNanoseconds"] / 1e3  # which the profiler's times are counted from
    for each in files:
        content["traceEvents"] += [_shift(event, base_us) for event in read_open_array(each)]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump(content, file)


def _shift(event: dict[str, Any], base_us: float) -> dict[str, Any]:
    """An event on the profiler's clock, in a process of its own."""
    moved = event | {"pid": f"exchange of rank {event['pid']}"}
    return moved | {"ts": event["ts"] - base_us} if "ts" in event else moved


def read_open_array(path: Path) -> list[dict[str, Any]]:
    """A JSON array that nobody closed."""
    return json.loads(path.read_text(encoding="utf-8").rstrip().rstrip(",") + "]")
