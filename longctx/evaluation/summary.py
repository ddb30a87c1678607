"""From records to one grid for each task: depth (or position, of perplexity) by length."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longctx.evaluation.record import PromptRecord
from longctx.evaluation.tasks.perplexity import Bucket, measure_perplexity, name_bucket

NO_DEPTH = "anywhere"


@dataclass(frozen=True, slots=True)
class Grid:
    """One task's values; None where nothing was measured."""

    task: str
    is_perplexity: bool
    rows: tuple[str, ...]  # depths from the top of the text down, or positions
    lengths: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]  # by row, then length
    overall: tuple[float, ...]  # by length
    num_prompts: tuple[int, ...]  # by length


def make_grids(records: Iterable[PromptRecord]) -> list[Grid]:
    """One for each task, in the order in which tasks come up."""
    by_task: dict[str, list[PromptRecord]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    return [_make_grid(task, own) for task, own in by_task.items()]


def list_cells(grids: Sequence[Grid]) -> list[dict[str, Any]]:
    """The grids as plain values, for the results."""
    return [
        {
            "task": grid.task,
            "measure": "perplexity" if grid.is_perplexity else "score",
            "length": length,
            "overall": grid.overall[column],
            "num_prompts": grid.num_prompts[column],
            "by_position" if grid.is_perplexity else "by_depth": {
                row: grid.values[index][column] for index, row in enumerate(grid.rows)
            },
        }
        for grid in grids
        for column, length in enumerate(grid.lengths)
    ]


def make_rows(grid: Grid) -> list[tuple[str, ...]]:
    """The grid as a table: a head and a row for each length."""
    what = "perplexity" if grid.is_perplexity else "score"
    rows = [(f"{grid.task}: {what}", *grid.rows, "all", "prompts")]
    for column, length in enumerate(grid.lengths):
        cells = (show_value(values[column], is_perplexity=grid.is_perplexity) for values in grid.values)
        overall = show_value(grid.overall[column], is_perplexity=grid.is_perplexity)
        rows.append((f"{length} tokens", *cells, overall, str(grid.num_prompts[column])))
    return rows


def show_value(value: float | None, *, is_perplexity: bool) -> str:
    """A value of a grid in a few characters."""
    if value is None:
        return "-"
    return f"{value:.4g}" if is_perplexity else f"{value:.2f}"


def _make_grid(task: str, records: list[PromptRecord]) -> Grid:
    is_perplexity = any(record.buckets for record in records)
    lengths = sorted({record.length for record in records})
    columns = [[record for record in records if record.length == length] for length in lengths]
    by_row = [_split_buckets(own) if is_perplexity else _split_depths(own) for own in columns]
    rows = list(dict.fromkeys(row for split in by_row for row in split))
    if not is_perplexity:
        rows.sort(key=lambda row: -1 if row == NO_DEPTH else int(row.split()[0]))
    return Grid(
        task,
        is_perplexity,
        tuple(rows),
        tuple(lengths),
        tuple(tuple(split.get(row) for split in by_row) for row in rows),
        tuple(_summarise(own, is_perplexity=is_perplexity) for own in columns),
        tuple(len(own) for own in columns),
    )


def _split_depths(records: list[PromptRecord]) -> dict[str, float]:
    by_depth: dict[str, list[float]] = {}
    for record in records:
        name = NO_DEPTH if record.depth is None else f"{record.depth} %"
        by_depth.setdefault(name, []).append(record.score)
    return {name: sum(scores) / len(scores) for name, scores in by_depth.items()}


def _split_buckets(records: list[PromptRecord]) -> dict[str, float]:
    by_place: dict[int, list[Bucket]] = {}
    for record in records:
        for bucket in record.buckets:
            by_place.setdefault(bucket.start, []).append(bucket)
    return {name_bucket(own[0]): measure_perplexity(own) for own in by_place.values()}


def _summarise(records: list[PromptRecord], *, is_perplexity: bool) -> float:
    if is_perplexity:
        return measure_perplexity([bucket for record in records for bucket in record.buckets])
    return sum(record.score for record in records) / len(records)
