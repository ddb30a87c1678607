"""Which query sees which key, as bands over tiles: what is empty is neither sent nor computed.

A tile is a rectangle of one rank's queries by one rank's keys; inside it row i sees columns j with ``i + low <= j <=
i + high``. Causal, window, packed documents, a cached prefix and strided layouts all come down to this one form.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from numbers import Integral

from parallel.layout import Span

UNBOUNDED = 1 << 60


@dataclass(frozen=True, slots=True)
class Mask:
    """Who sees whom, over the global sequence.

    Query and key indices are positions in one global sequence: after a cached prefix the queries' first index is the
    prefix' length. With a ``window`` of w, query i sees keys j with ``0 <= i - j < w``; with ``cu_seqlens``, only
    those of its own document. With a ``window_group`` of g above 1 the window reaches back to a multiple of g, counted
    from the document's beginning: query i sees keys from ``max(0, (i + 1 - w) // g) * g`` on, w to w + g - 1 of them.
    """

    causal: bool = True
    window: int | None = None
    cu_seqlens: tuple[int, ...] | None = None
    window_group: int = 1

    def __post_init__(self) -> None:
        if self.window is not None and not (isinstance(self.window, Integral) and self.window >= 1):
            raise ValueError(f"window={self.window} is not allowed: a whole number of at least 1, or None")
        if self.window is not None and not self.causal:
            raise ValueError("window with causal=False is not allowed: a window looks back from each query")
        if not (isinstance(self.window_group, Integral) and self.window_group >= 1):
            raise ValueError(f"window_group={self.window_group} is not allowed: a whole number of at least 1")
        if self.window_group > 1 and self.window is None:
            raise ValueError(f"window_group={self.window_group} is not allowed without a window")

    @property
    def reach(self) -> int | None:
        """Keys that a query sees at most; None: no window."""
        return None if self.window is None else self.window + self.window_group - 1


@dataclass(frozen=True, slots=True)
class Stairs:
    """The edge of a window that reaches back to multiples of ``group``, inside a tile.

    Row i stands at ``q_position + i * step`` of its document and sees the columns, at ``kv_position + j * step``, that
    stand at ``max(0, (its position + 1 - window) // group) * group`` or behind.
    """

    q_position: int
    kv_position: int
    step: int
    window: int
    group: int

    def cut(self, row: int, column: int) -> "Stairs":
        """For a tile that begins at this row and column of the tile."""
        q_position, kv_position = self.q_position + row * self.step, self.kv_position + column * self.step
        return Stairs(q_position, kv_position, self.step, self.window, self.group)

    def hides(self, num_rows: int) -> bool:
        """Whether any column is hidden from any of the rows."""
        last = self.q_position + (num_rows - 1) * self.step
        return (last + 1 - self.window) // self.group * self.group > self.kv_position


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows ``[q_start, q_stop)`` of one rank's queries by rows ``[kv_start, kv_stop)`` of one rank's keys.

    Row i of the tile sees its columns j with ``i + low <= j <= i + high``; every row sees at least one, every column is
    seen by at least one. ``stairs`` hide a few more of them: then a row or a column may be left with nothing.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    low: int = -UNBOUNDED
    high: int = UNBOUNDED
    stairs: Stairs | None = None

    @property
    def area(self) -> int:
        """Unmasked entries, not counting what ``stairs`` hide."""
        rows, columns = self.q_stop - self.q_start, self.kv_stop - self.kv_start
        return _count_below(rows, columns, self.high + 1) - _count_below(rows, columns, self.low)

    @property
    def is_full(self) -> bool:
        """Whether nothing is masked."""
        return (
            self.stairs is None
            and self.low <= 1 - (self.q_stop - self.q_start)
            and self.high >= self.kv_stop - self.kv_start - 1
        )


def make_tiles(mask: Mask, q_spans: Sequence[Span], kv_spans: Sequence[Span]) -> tuple[Tile, ...]:
    """What queries in ``q_spans`` see of keys in ``kv_spans``; rows are counted over each rank's spans."""
    tiles: list[Tile] = []
    q_row = 0
    starts, kv_rows = [span.start for span in kv_spans], [0, *accumulate(len(span) for span in kv_spans)]
    is_sorted = all(before.stop <= after.start for before, after in pairwise(kv_spans))
    for q_span in q_spans:
        first, end = 0, len(kv_spans)
        if is_sorted:  # then many short documents cost no more than those that are near
            low, high = _reach(mask, q_span)
            first, end = max(0, bisect_right(starts, low) - 1), bisect_left(starts, high)
        for index in range(first, end):
            kv_span = kv_spans[index]
            if q_span.step != kv_span.step and min(len(q_span), len(kv_span)) > 1:
                raise ValueError("queries and keys must have the same stride: one is striped, the other is not")
            tiles += _tiles_of_spans(mask, q_span, kv_span, q_row, kv_rows[index])
        q_row += len(q_span)
    return tuple(tiles)


def _reach(mask: Mask, q_span: Span) -> tuple[int, int]:
    """Keys that any query of the span may see lie in this range."""
    low, high = 0, UNBOUNDED
    if mask.cu_seqlens is not None:
        bounds = mask.cu_seqlens
        low = bounds[max(0, bisect_right(bounds, q_span.start) - 1)]
        high = bounds[min(len(bounds) - 1, bisect_right(bounds, q_span.stop - 1))]
    if mask.causal:
        high = min(high, q_span.stop)
    if mask.window is not None:
        low = max(low, q_span.start - mask.window - mask.window_group + 2)
    return low, high


def _tiles_of_spans(mask: Mask, q_span: Span, kv_span: Span, q_row: int, kv_row: int) -> Iterator[Tile]:
    step = kv_span.step if len(q_span) == 1 else q_span.step
    for start, stop in _shared_documents(mask, q_span, kv_span):
        q_first, q_end = _rows_in(q_span, start, stop)
        kv_first, kv_end = _rows_in(kv_span, start, stop)
        num_rows, num_columns = q_end - q_first, kv_end - kv_first
        if num_rows <= 0 or num_columns <= 0:
            continue
        # row i is at q_start + i * step, column j at kv_start + j * step
        ahead = q_span.start + q_first * q_span.step - (kv_span.start + kv_first * kv_span.step)
        high = ahead // step if mask.causal else UNBOUNDED
        low = (ahead - mask.reach) // step + 1 if mask.reach is not None else -UNBOUNDED
        tile = _trim(num_rows, num_columns, low, high, q_row + q_first, kv_row + kv_first)
        if tile is None:
            continue
        if mask.window is None or mask.window_group == 1:
            yield tile
            continue
        begin = start if mask.cu_seqlens is not None else 0
        q_position = q_span.start + (tile.q_start - q_row) * q_span.step - begin
        kv_position = kv_span.start + (tile.kv_start - kv_row) * kv_span.step - begin
        stairs = Stairs(q_position, kv_position, step, mask.window, mask.window_group)
        yield replace(tile, stairs=stairs) if stairs.hides(tile.q_stop - tile.q_start) else tile


def _trim(num_rows: int, num_columns: int, low: int, high: int, q_row: int, kv_row: int) -> Tile | None:
    """Without rows and columns that see nothing."""
    first, end = max(0, -high), min(num_rows, num_columns - low)
    left, right = max(0, first + low), min(num_columns, end + high)
    if low > high or first >= end or left >= right:
        return None
    shift = left - first
    low, high = max(low - shift, -UNBOUNDED), min(high - shift, UNBOUNDED)
    if low <= 1 - (end - first):
        low = -UNBOUNDED
    if high >= right - left - 1:
        high = UNBOUNDED
    return Tile(q_row + first, q_row + end, kv_row + left, kv_row + right, low, high)


def _shared_documents(mask: Mask, q_span: Span, kv_span: Span) -> Iterator[tuple[int, int]]:
    if mask.cu_seqlens is None:
        yield min(q_span.start, kv_span.start), max(q_span.stop, kv_span.stop)
        return
    bounds = mask.cu_seqlens
    index = max(0, bisect_right(bounds, max(q_span.start, kv_span.start)) - 1)
    while index + 1 < len(bounds) and bounds[index] < min(q_span.stop, kv_span.stop):
        yield bounds[index], bounds[index + 1]
        index += 1


def _rows_in(span: Span, start: int, stop: int) -> tuple[int, int]:
    """Rows of ``span`` whose index lies in ``[start, stop)``."""
    first = -(-(max(start, span.start) - span.start) // span.step)
    end = -(-(min(stop, span.stop) - span.start) // span.step)
    return first, max(first, end)


def _count_below(rows: int, columns: int, diagonal: int) -> int:
    """Entries (i, j) of a rectangle with ``j < i + diagonal``."""
    first = min(max(-diagonal, 0), rows)  # rows before it count nothing
    end = min(max(columns - diagonal, first), rows)  # rows from it on count all columns
    rising = end - first
    return rising * (first + diagonal) + rising * (rising - 1) // 2 + (rows - end) * columns
