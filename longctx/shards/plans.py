"""The exchange of one step: which plan, and which keys each row of each of this rank's works sees.

Where every sequence computes one token, the plan depends only on who holds the tokens and who holds any keys: it is
kept from step to step. Otherwise it is planned for the step's own tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch

from longctx.attention.batch import AttentionShape, KeyRanges
from longctx.shards.layout import StepLayout, pad_tables
from parallel.layout import Span
from parallel.links import LinkModel
from parallel.mask import Mask
from parallel.plan import Plan, Problem, Rows, Work, rows_of, unite
from parallel.planner import plan_anew

DECODE_PLAN = "q_direct"


@dataclass(frozen=True, slots=True)
class PlanChoice:
    """How prompts are exchanged."""

    name: str = "auto"
    links: LinkModel = field(default_factory=LinkModel)


@dataclass(frozen=True, slots=True, eq=False)
class WorkRanges:
    """One work's rows, and what each sees of the keys: of this rank's pages, or of the rows that a move brought."""

    q_rows: Rows  # of the owner's tokens
    ranges: KeyRanges


@dataclass(frozen=True, slots=True, eq=False)
class RankPlan:
    """One rank's part of a step's exchange."""

    plan: Plan
    works: dict[int, WorkRanges]  # by the work's id()

    @property
    def sends_keys(self) -> bool:
        """Whether keys leave for other ranks."""
        return any(move.kind == "kv" for move in self.plan.moves)


class StepPlans:
    """The plans of one step, one for each window that the model's layers have.

    Args:
        layout: who holds what.
        rank: this one.
        dtype, device: of q, k and v.
        choice: for steps with prompts.
    """

    def __init__(
        self, layout: StepLayout, rank: int, *, dtype: torch.dtype, device: torch.device, choice: PlanChoice
    ) -> None:
        self.layout, self.rank = layout, rank
        self._element_size, self._device, self._choice = dtype.itemsize, device, choice
        self._by_window: dict[int | None, RankPlan] = {}

    @cached_property
    def key_slots_L(self) -> torch.Tensor:
        """Slots of this rank's keys, int64, by sequence and position; made only where keys travel."""
        return torch.from_numpy(self.layout.key_slots(self.rank)).to(self._device)

    def of(self, shape: AttentionShape) -> RankPlan:
        """The plan for a layer."""
        known = self._by_window.get(shape.window)
        if known is None:
            decode = self.layout.is_decode
            known = self._by_window[shape.window] = self._plan_decode(shape) if decode else self._plan(shape)
        return known

    def _plan(self, shape: AttentionShape) -> RankPlan:
        layout = self.layout
        problem = Problem(
            Mask(True, shape.window, layout.bounds),
            layout.q_layout,
            layout.kv_layout,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            element_size=self._element_size,
        )
        plan = plan_anew(self._choice.name, problem, self._choice.links)
        return RankPlan(plan, {id(work): self._ranges(plan, work) for work in plan.works_of(self.rank)})

    def _plan_decode(self, shape: AttentionShape) -> RankPlan:
        layout, rank = self.layout, self.rank
        counts = layout.num_keys
        owners = tuple(layout.owner_of_last(index) for index in range(len(layout.segments)))
        first = np.zeros_like(counts)
        if shape.window is not None:
            first = self._first_in_window(shape.window)
        holders = tuple(map(tuple, (counts > first).tolist()))
        heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
        plan = _plan_decode(owners, holders, heads, self._element_size)
        works = {}
        for work in plan.works_of(rank):
            seen = [index for index, owner in enumerate(owners) if owner == work.q_owner and holders[index][rank]]
            ranges = self._decode_ranges(seen, first[:, rank], counts[:, rank])
            works[id(work)] = WorkRanges(unite(rows_of(work.tiles, "q")), ranges)
        return RankPlan(plan, works)

    def _first_in_window(self, window: int) -> np.ndarray:
        """The first key of each sequence on each rank that its last token sees, counted over the rank's own."""
        layout = self.layout
        first = np.zeros_like(layout.num_keys)
        for rank, spans in enumerate(layout.kv_layout):
            for span in spans:
                index = int(np.searchsorted(layout.bounds, span.start, side="right")) - 1
                hidden_stop = layout.bounds[index + 1] - window  # keys before this are out of the window
                first[index, rank] += min(max(hidden_stop - span.start, 0), len(span))
        return first

    def _decode_ranges(self, indices: Sequence[int], first: np.ndarray, last: np.ndarray) -> KeyRanges:
        rows = list(indices)
        return self._key_ranges(np.arange(len(rows) + 1), self._tables(rows), first[rows], last[rows])

    def _key_ranges(
        self, cu_seqlens: np.ndarray, tables: torch.Tensor, first: np.ndarray, last: np.ndarray
    ) -> KeyRanges:
        cu_seqlens_B1, first_S, last_S = (
            torch.from_numpy(array.astype(np.int32)).to(self._device) for array in (cu_seqlens, first, last)
        )
        return KeyRanges(cu_seqlens_B1, tables, first_S, last_S)

    def _tables(self, indices: Sequence[int]) -> torch.Tensor:
        """This rank's pages of some sequences, padded."""
        pages = [self.layout.local_pages(index, self.rank) for index in indices]
        return torch.from_numpy(pad_tables(pages)).to(self._device)

    def _ranges(self, plan: Plan, work: Work) -> WorkRanges:
        """What each row of a work sees: its tiles, row by row."""
        layout, is_local = self.layout, work.kv_owner == self.rank
        num_q = plan.problem.num_q[work.q_owner]
        first = np.full(num_q, np.iinfo(np.int64).max)
        last = np.zeros(num_q, dtype=np.int64)
        for tile in work.tiles:
            rows = np.arange(tile.q_stop - tile.q_start)
            columns = tile.kv_stop - tile.kv_start
            own = slice(tile.q_start, tile.q_stop)
            first[own] = np.minimum(first[own], tile.kv_start + np.clip(rows + tile.low, 0, columns))
            last[own] = np.maximum(last[own], tile.kv_start + np.clip(rows + tile.high + 1, 0, columns))
        q_rows = unite(rows_of(work.tiles, "q"))
        chosen = np.concatenate([np.arange(start, stop) for start, stop in q_rows])
        sequences = np.searchsorted(layout.first_queries[:, work.q_owner], chosen, side="right") - 1
        counts = np.bincount(sequences)
        indices = np.flatnonzero(counts)
        cu_seqlens = np.concatenate(([0], counts[indices].cumsum()))
        first, last = first[chosen], last[chosen]
        if is_local:
            base = np.repeat(layout.first_keys[indices, self.rank], counts[indices])
            first, last, tables = first - base, last - base, self._tables(indices.tolist())
        else:
            brought = next(
                move.rows
                for move in plan.moves
                if (move.kind, move.owner, move.destination, move.heads) == ("kv", work.kv_owner, self.rank, work.heads)
            )
            first, last = _compact(brought, first, last)
            # whoever puts them into pages knows which
            tables = torch.empty((len(indices), 0), dtype=torch.int32, device=self._device)
        return WorkRanges(q_rows, self._key_ranges(cu_seqlens, tables, first, last))


def _compact(rows: Rows, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Key rows counted over those that travelled; a query's lie in a row there, too."""
    starts = np.array([start for start, _ in rows])
    shifts = starts - np.concatenate(([0], np.cumsum([stop - start for start, stop in rows])[:-1]))
    shift = shifts[np.searchsorted(starts, first, side="right") - 1]
    last_shift = shifts[np.searchsorted(starts, last - 1, side="right") - 1]
    return first - shift, last - last_shift


@lru_cache(maxsize=4096)
def _plan_decode(
    owners: tuple[int, ...], holders: tuple[tuple[bool, ...], ...], heads: tuple[int, int, int], element_size: int
) -> Plan:
    """One token of each sequence, at its owner, against a key at each rank that holds any."""
    world_size = len(holders[0])
    q_layout = tuple(
        tuple(Span(world_size * index, world_size * index + 1) for index, owner in enumerate(owners) if owner == rank)
        for rank in range(world_size)
    )
    kv_layout = tuple(
        tuple(
            Span(world_size * index + rank, world_size * index + rank + 1)
            for index, held in enumerate(holders)
            if held[rank]
        )
        for rank in range(world_size)
    )
    mask = Mask(causal=False, cu_seqlens=tuple(range(0, world_size * len(owners) + 1, world_size)))
    problem = Problem(mask, q_layout, kv_layout, *heads, element_size=element_size)
    return plan_anew(DECODE_PLAN, problem, LinkModel())
