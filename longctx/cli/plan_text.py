"""Plans as text: rows with their columns one below the other."""

from collections.abc import Iterator, Mapping, Sequence

GIB = 2**30
FILLED_SHARE = 0.95  # of the memory that a plan may fill: what is predicted is a few percent off


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line for each row; all rows have as many cells."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def describe_parts(parts: Mapping[str, int]) -> Iterator[str]:
    """Parts of a memory and their sum; those that are nothing are left out."""
    rows = [(name, f"{size / GIB:.3f} GiB") for name, size in parts.items() if size]
    yield from (f"  {line}" for line in align([*rows, ("total", f"{sum(parts.values()) / GIB:.3f} GiB")]))
