"""Which tokens of a global sequence each rank holds, and in which order.

A layout is pure arithmetic: per rank a tuple of spans, arithmetic progressions of global token indices. Contiguous;
zigzag (rank r holds chunks r and 2W-1-r of 2W, which balances a causal mask); striped after Striped Attention (arXiv
2311.09431); balanced for packed documents: each rank gets the same unmasked area, and a document lies on as few ranks
as that allows. No torch here: ``parallel/shard.py`` cuts tensors.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
FACTOR = 2  # in length, of long documents that share the ranks
SLIVER = 0.01  # of a rank's share of the area: less of a document is not worth another rank


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``start, start + step, ...`` before ``stop``."""

    start: int
    stop: int
    step: int = 1

    def __len__(self) -> int:
        return max(0, -(-(self.stop - self.start) // self.step))


Layout = tuple[tuple[Span, ...], ...]  # per rank, in the order in which the rank holds them


def make_layout(
    name: str, length: int, world_size: int, *, cu_seqlens: Sequence[int] | None = None, offset: int = 0
) -> Layout:
    """The spans of every rank for ``length`` tokens that begin at global index ``offset``.

    Args:
        name: one of ``LAYOUTS``.
        length: tokens in all; any number, also fewer than ranks.
        world_size: ranks.
        cu_seqlens: document boundaries ``[0, ..., offset + length]``; ``balanced`` without them is zigzag.
        offset: global index of the first token.

    Raises:
        ValueError: if the name is unknown.
    """
    if name == "contiguous":
        layout = tuple(_spans([_chunk(length, rank, world_size)]) for rank in range(world_size))
    elif name == "zigzag":
        layout = _zigzag(0, length, world_size)
    elif name == "striped":
        layout = tuple(tuple(s for s in (Span(rank, length, world_size),) if len(s)) for rank in range(world_size))
    elif name == "balanced":
        layout = _balance(_documents(cu_seqlens, offset, length), world_size)
    else:
        raise ValueError(f"layout {name!r} is unknown; allowed: {', '.join(LAYOUTS)}")
    return tuple(tuple(Span(s.start + offset, s.stop + offset, s.step) for s in spans) for spans in layout)


def join_layouts(layouts: Sequence[Layout]) -> Layout:
    """Each rank holds its part of the first, then of the second, ...: the KV of a prompt that came in chunks."""
    return tuple(tuple(span for layout in layouts for span in layout[rank]) for rank in range(len(layouts[0])))


def count_tokens(spans: Sequence[Span]) -> int:
    """Tokens that a rank with these spans holds."""
    return sum(len(span) for span in spans)


def list_cu_seqlens(cu_seqlens: Iterable[Any] | None) -> tuple[int, ...] | None:
    """Document boundaries as integers; ``ValueError`` for what is no sequence of whole numbers."""
    try:
        return None if cu_seqlens is None else tuple(operator.index(bound) for bound in cu_seqlens)
    except TypeError:
        raise ValueError(f"cu_seqlens={cu_seqlens} is not allowed: whole numbers, [num_documents + 1]") from None


def check_cu_seqlens(cu_seqlens: Iterable[Any] | None, length: int) -> tuple[int, ...] | None:
    """Document boundaries as integers; ``ValueError`` unless they rise from 0 to ``length``."""
    bounds = list_cu_seqlens(cu_seqlens)
    if bounds is None:
        return None
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in pairwise(bounds)):
        shown = f"[{', '.join(map(str, bounds[:3]))}, ...]" if len(bounds) > 4 else str(list(bounds))
        raise ValueError(f"cu_seqlens={shown} is not allowed: it rises from 0 to the sequence's length, {length}")
    return bounds


def _chunk(length: int, index: int, num_chunks: int) -> tuple[int, int]:
    return length * index // num_chunks, length * (index + 1) // num_chunks


def _spans(ranges: Sequence[tuple[int, int]]) -> tuple[Span, ...]:
    """Spans of ranges in their order; neighbours that touch become one, empty ones none."""
    spans: list[Span] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if spans and spans[-1].stop == start:
            spans[-1] = Span(spans[-1].start, stop)
        else:
            spans.append(Span(start, stop))
    return tuple(spans)


def _zigzag(start: int, stop: int, world_size: int) -> Layout:
    chunks = [_chunk(stop - start, index, 2 * world_size) for index in range(2 * world_size)]
    own = ((chunks[rank], chunks[2 * world_size - 1 - rank]) for rank in range(world_size))
    return tuple(_spans([(start + low, start + high) for low, high in pair]) for pair in own)


def _documents(cu_seqlens: Sequence[int] | None, offset: int, length: int) -> list[tuple[int, int]]:
    """Documents inside ``[offset, offset + length)``, counted from ``offset``."""
    bounds = cu_seqlens or (offset, offset + length)
    clipped = [min(max(bound - offset, 0), length) for bound in bounds]
    return [(start, stop) for start, stop in pairwise(clipped) if start < stop]


def _balance(documents: Sequence[tuple[int, int]], world_size: int) -> Layout:
    """Areas alike on every rank, of long documents tokens nearly so, and few pieces of a document.

    A document is long if its causal area is more than one rank's share. Long ones whose lengths are within a factor
    of two share the ranks: each lies on as many as its part of their area, as a zigzag, and every rank gets the same of
    them. The others fill up the ranks in order, each cut where a rank is full.
    """
    share = sum(_area(stop - start) for start, stop in documents) / world_size
    ranks = [_Rank(share) for _ in range(world_size)]
    long = [(start, stop) for start, stop in documents if _area(stop - start) > share]
    alike: list[tuple[int, int]] = []
    for start, stop in sorted(long, key=lambda each: each[0] - each[1]):
        if alike and FACTOR * (stop - start) < alike[0][1] - alike[0][0]:
            _spread(alike, ranks)
            alike = []
        alike.append((start, stop))
    if alike:
        _spread(alike, ranks)
    _fill([each for each in documents if each not in long], ranks)
    return tuple(_spans(sorted(rank.ranges)) for rank in ranks)


@dataclass(slots=True)
class _Rank:
    """What a rank is given, and how much it has room for."""

    room: float
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def take(self, start: int, stop: int, document: int) -> None:
        """Rows of the document that begins at ``document``."""
        self.ranges.append((start, stop))
        self.room -= _area(stop - document) - _area(start - document)


def _spread(documents: Sequence[tuple[int, int]], ranks: Sequence[_Rank]) -> None:
    """The same area on every rank. A document lies on one rank after another from both of its ends inwards, where equal
    widths have as area the width times the length."""
    share = sum(_area(stop - start) for start, stop in documents) / len(ranks)
    rank, room = 0, share  # what ranks before have too much by rounding is taken off
    for start, stop in documents:
        length, low = stop - start, 0
        while low < length - low:
            is_last = rank == len(ranks) - 1
            half = (length - 2 * low + 1) // 2
            width = min(half, max(0, round(room / length)))
            if is_last or (half - width) * length < SLIVER * share:
                width = half
            elif not width or room < SLIVER * share:
                rank, room = rank + 1, room + share
                continue
            high = low + width
            before = ranks[rank].room
            ranks[rank].take(start + low, start + high, start)
            ranks[rank].take(max(start + high, stop - high), stop - low, start)
            room += ranks[rank].room - before
            low = high


def _fill(documents: Sequence[tuple[int, int]], ranks: Sequence[_Rank]) -> None:
    """Rows in order, onto one rank after another until it has no more room."""
    index, surplus = 0, 0.0
    for start, stop in documents:
        row = start
        while row < stop:
            rank, is_last = ranks[index], index == len(ranks) - 1
            end = stop if is_last else min(stop, start + _rows_within(_area(row - start) + rank.room - surplus))
            if end > row:
                rank.take(row, end, start)
                row = end
            if row < stop:
                surplus -= rank.room
                index += 1


def _area(num_tokens: int) -> int:
    """Unmasked entries of the first ``num_tokens`` rows of a causal document."""
    return num_tokens * (num_tokens + 1) // 2


def _rows_within(area: float) -> int:
    """Rows from a document's beginning whose area is nearest to ``area``."""
    return max(0, round(((8 * max(area, 0) + 1) ** 0.5 - 1) / 2))
