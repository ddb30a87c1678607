"""Who holds what in one step: each rank's tokens and keys, by sequence.

All sequences of a step lie behind each other in one global sequence, each as a document: that is what the mask and
the exchange plans know. A rank's rows are its tokens (or keys) in that order.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from longctx.shards.step import Int32Array, Int64Array, Segment
from parallel.layout import Layout, Span


class StepLayout:
    """Where a step's tokens and keys are.

    Args:
        segments: the step's.
        world_size: ranks.
        page_size: tokens of a page.
        pages_per_rank: page p is page ``p % pages_per_rank`` of rank ``p // pages_per_rank``.
    """

    def __init__(self, segments: Sequence[Segment], *, world_size: int, page_size: int, pages_per_rank: int) -> None:
        self.segments, self.world_size, self.page_size = tuple(segments), world_size, page_size
        self.bounds = (0, *accumulate(segment.stop for segment in self.segments))  # of the documents
        self._owners = [segment.pages[: -(-segment.stop // page_size)] // pages_per_rank for segment in self.segments]
        self._pages_per_rank = pages_per_rank

    @property
    def is_decode(self) -> bool:
        """Whether every sequence computes one token."""
        return all(segment.stop - segment.start == 1 for segment in self.segments)

    def owner_of_last(self, index: int) -> int:
        """Who computes the last token of the ``index``-th sequence."""
        return int(self._owners[index][-1])

    def local_pages(self, index: int, rank: int) -> Int32Array:
        """The rank's pages of the ``index``-th sequence, in sequence order, as it numbers them."""
        owners = self._owners[index]
        return self.segments[index].pages[: len(owners)][owners == rank] % self._pages_per_rank

    @cached_property
    def filled_pages(self) -> list[Int64Array]:
        """Pages of each rank whose last token the step computes, as rank 0 numbers them, by sequence and position."""
        size = self.page_size
        filled = [segment.pages[segment.start // size : segment.stop // size] for segment in self.segments]
        pages = np.concatenate([np.zeros(0, dtype=np.int64), *filled], dtype=np.int64)
        return split_by_rank(pages, world_size=self.world_size, pages_per_rank=self._pages_per_rank)

    def looks_at(self, rank: int, other: int) -> bool:
        """Whether tokens that ``rank`` computes may look at keys of another rank."""
        num_tokens = np.diff(self.first_queries[:, rank])
        return rank != other and bool(((num_tokens > 0) & (self.num_keys[:, other] > 0)).any())

    def key_slots(self, rank: int) -> Int64Array:
        """Slots of the rank's keys in its pool, in the order of its rows."""
        slots = [np.zeros(0, dtype=np.int64)]
        for index, num_keys in enumerate(self.num_keys[:, rank].tolist()):
            starts = self.local_pages(index, rank).astype(np.int64)[:, None] * self.page_size
            slots.append((starts + np.arange(self.page_size)).reshape(-1)[:num_keys])
        return np.concatenate(slots)

    def positions(self, index: int, rank: int) -> Int64Array:
        """Positions of the tokens of the ``index``-th sequence that the rank computes."""
        segment = self.segments[index]
        all_positions = np.arange(segment.start, segment.stop)
        return all_positions[self._owners[index][all_positions // self.page_size] == rank]

    @cached_property
    def num_keys(self) -> Int64Array:
        """Keys of each rank ``[world_size]`` of each sequence: ``[num_segments, world_size]``."""
        return self._count([0] * len(self.segments))

    @cached_property
    def first_keys(self) -> Int64Array:
        """Row of each sequence's first key among a rank's keys, ``[num_segments + 1, world_size]``."""
        return np.concatenate((np.zeros((1, self.world_size), dtype=np.int64), self.num_keys.cumsum(0)))

    @cached_property
    def first_queries(self) -> Int64Array:
        """Row of each sequence's first token among a rank's tokens, ``[num_segments + 1, world_size]``."""
        counts = self._count([segment.start for segment in self.segments])
        return np.concatenate((np.zeros((1, self.world_size), dtype=np.int64), counts.cumsum(0)))

    @cached_property
    def q_layout(self) -> Layout:
        """Each rank's tokens, over the global sequence."""
        return self._layout([segment.start for segment in self.segments])

    @cached_property
    def kv_layout(self) -> Layout:
        """Each rank's keys, over the global sequence."""
        return self._layout([0] * len(self.segments))

    def _count(self, starts: Sequence[int]) -> Int64Array:
        """Tokens of each sequence from a position on at each rank: ``[num_segments, world_size]``."""
        counts, size = np.zeros((len(self.segments), self.world_size), dtype=np.int64), self.page_size
        for row, start, segment, owners in zip(counts, starts, self.segments, self._owners, strict=True):
            first = start // size
            row += np.bincount(owners[first:], minlength=self.world_size) * size
            row[owners[first]] -= start - first * size
            row[owners[-1]] -= len(owners) * size - segment.stop
        return counts

    def _layout(self, starts: Sequence[int]) -> Layout:
        return tuple(
            tuple(span for index, start in enumerate(starts) for span in self._spans(index, rank, start))
            for rank in range(self.world_size)
        )

    def _spans(self, index: int, rank: int, start: int) -> list[Span]:
        """The rank's tokens of one sequence from position ``start`` on."""
        base, stop, size = self.bounds[index], self.segments[index].stop, self.page_size
        return [
            Span(base + max(start, first * size), base + min(stop, last * size))
            for first, last, owner in self._runs[index]
            if owner == rank and last * size > start
        ]

    @cached_property
    def _runs(self) -> list[list[tuple[int, int, int]]]:
        """Pages in a row on one rank: (first, last + 1, rank) of each sequence."""
        runs = []
        for owners in self._owners:
            cuts = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
            runs.append([(a, b, int(owners[a])) for a, b in pairwise(cuts)])
        return runs


def split_by_rank(pages: Int64Array, *, world_size: int, pages_per_rank: int) -> list[Int64Array]:
    """Each rank's among pages as rank 0 numbers them, in their order."""
    return [pages[pages // pages_per_rank == rank] for rank in range(world_size)]


def pad_tables(pages: Sequence[Int32Array]) -> Int32Array:
    """Pages of some sequences as a block table: int32 ``[num_sequences, pages of the longest]``, padded with 0."""
    tables = np.zeros((len(pages), max(map(len, pages), default=0)), dtype=np.int32)
    for row, own in zip(tables, pages, strict=True):
        row[: len(own)] = own
    return tables
