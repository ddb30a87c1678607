"""From the records of a grid to JSON and a table."""

import statistics
from dataclasses import asdict
from typing import Any

from benchmarks.checkpoints import Shape
from benchmarks.timings import Limits, summarise
from benchmarks.waves import Grid, Record

COMPARED = ("prefill_tokens_per_s", "ttft_s", "tpot_ms", "itl_ms", "requests_per_s", "output_tokens_per_s")
COLUMNS = (
    ("TTFT s", "ttft_s", "{:.3f}"),
    ("prefill tok/s", "prefill_tokens_per_s", "{:.0f}"),
    ("TPOT ms", "tpot_ms", "{:.1f}"),
    ("ITL ms", "itl_ms", "{:.1f}"),
    ("req/s", "requests_per_s", "{:.2f}"),
    ("out tok/s", "output_tokens_per_s", "{:.1f}"),
    ("matmul share", "prefill_share_of_matmul", "{:.0%}"),
    ("read share", "decode_share_of_bandwidth", "{:.0%}"),
)


def describe_cells(grid: Grid, shape: Shape, limits: Limits, *, baseline: str) -> list[dict[str, Any]]:
    """Every cell with every engine's medians, spread, shares, memory, and ratio to the baseline.

    A ratio is the median over rounds of this engine's number over the baseline's of the same round, so that noise that
    lasts longer than a round cancels.
    """
    cells = []
    for cell in grid.cells:
        sizes = asdict(cell)
        engines: dict[str, Any] = {}
        for engine in grid.engines:
            record = grid.records[cell, engine.name]
            if not record.rounds:
                engines[engine.name] = {"skipped": record.skipped or "no round was finished"}
                continue
            numbers = summarise(record.rounds, shape, limits, **sizes)
            numbers |= {"num_rounds": len(record.rounds), "peak_memory_bytes": record.peak_memory_bytes}
            other = grid.records.get((cell, baseline))
            if other is not None and other.rounds and engine.name != baseline:
                numbers[f"ratio_to_{baseline}"] = compare(record, other)
            engines[engine.name] = numbers
        cells.append(sizes | {"engines": engines})
    return cells


def compare(record: Record, baseline: Record) -> dict[str, float]:
    """Median ratio over the rounds that both finished."""
    pairs = list(zip(record.rounds, baseline.rounds, strict=False))
    return {name: statistics.median(ours[name] / theirs[name] for ours, theirs in pairs) for name in COMPARED}


def round_floats(value: Any) -> Any:
    """The same with floats cut to four significant digits: more are noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: round_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round_floats(item) for item in value]
    return value


def make_table(cells: list[dict[str, Any]]) -> str:
    """A Markdown table of all cells' medians."""
    header = ["prompt x streams", "engine", *(title for title, _, _ in COLUMNS), "memory GiB"]
    rows = [header, ["---"] * len(header)]
    for cell in cells:
        load = f"{cell['num_prompt_tokens']} x {cell['num_streams']}"
        for name, numbers in cell["engines"].items():
            if "skipped" in numbers:
                rows.append([load, name, "skipped: " + numbers["skipped"][:60], *[""] * (len(header) - 3)])
                continue
            values = [text.format(numbers[key]) for _, key, text in COLUMNS]
            rows.append([load, name, *values, f"{numbers['peak_memory_bytes'] / 2**30:.2f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
