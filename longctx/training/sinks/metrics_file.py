"""``output/metrics.jsonl``: every step as one line of JSON, what the report is made of.

A run that goes on from step n cuts the lines of later steps, which are computed again, and a line that was not finished
when the run was killed.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longctx.errors import LongctxError
from longctx.training.record import StepRecord
from longctx.training.sinks.sink import LoggedRun, Sink

FILE_NAME = "metrics.jsonl"


class MetricsFile(Sink):
    """Appends a line a step, each written through to the file system."""

    def __init__(self, run: LoggedRun) -> None:
        path = run.output / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut(path, run.start_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: StepRecord, eta_s: float) -> None:
        values = {key: _finite(value) for key, value in dataclasses.asdict(record).items()}
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(output: Path) -> list[StepRecord]:
    """Every step of the run in ``output``. Raises ``LongctxError`` naming the file and line that is not one."""
    path = output / FILE_NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LongctxError(f"{path} cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_parse(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise LongctxError(f"{path}: line {number} is no record of a step: {line[:80]}") from None
    return records


def _parse(values: dict[str, Any]) -> StepRecord:
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        arguments[name] = math.nan if value is None and name != "eval_loss" else value
    arguments["memory_bytes"] = tuple(values["memory_bytes"])
    return StepRecord(**arguments)


def _cut(path: Path, start_step: int) -> None:
    """Leave whole lines of steps up to ``start_step``."""
    if not path.exists():
        return
    kept = list(_lines_until(path, start_step))
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _lines_until(path: Path, start_step: int) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            continue
        if line.endswith("\n") and step <= start_step:
            yield line


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
