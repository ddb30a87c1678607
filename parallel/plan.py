"""Exchange plans: who computes which tile when, and what travels between ranks for it.

A plan is data. A strategy (``parallel/plans``) says where and in which step every pair of a query owner and a key
owner meets, and along which hops queries and keys get there; ``PlanBuilder.finish`` cuts each hop down to the rows
that somebody behind it needs. One executor (``parallel/exchange.py``) runs any plan, forward and backward, and one
model counts its bytes and time.

    step s:  moves of step s are posted | works of step s compute

A work or a later move may use what was posted in earlier steps. Partial results leave for their owner in the step after
the last work that adds to them.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from parallel.layout import Layout, check_cu_seqlens, count_tokens, join_layouts, make_layout
from parallel.mask import Mask, Tile, make_tiles

Rows = tuple[tuple[int, int], ...]  # ranges of a rank's local rows, rising, apart from each other
Heads = tuple[int, int]  # range of query heads


@dataclass(frozen=True)
class Problem:
    """One attention over a sharded sequence.

    Args:
        mask: over global positions.
        q_layout, kv_layout: who holds which queries and keys.
        num_heads, num_kv_heads, head_dim: of the model.
        batch_size: sequences side by side, all of these layouts.
        element_size: bytes of an element of q, k and v.
        num_nodes: nodes that the ranks are spread over, the same number on each, in order.
    """

    mask: Mask
    q_layout: Layout
    kv_layout: Layout
    num_heads: int
    num_kv_heads: int
    head_dim: int
    batch_size: int = 1
    element_size: int = 4
    num_nodes: int = 1

    @property
    def world_size(self) -> int:
        """Ranks."""
        return len(self.q_layout)

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def accumulator_size(self) -> int:
        """Bytes of an element of partial results and gradients: float32 at least, so that errors do not grow with W."""
        return max(4, self.element_size)

    @property
    def all_heads(self) -> Heads:
        """Every query head."""
        return 0, self.num_heads

    def split_heads_in_two(self) -> tuple[Heads, Heads]:
        """Two halves, cut between KV heads where there are several; the first is empty if there is one head."""
        whole = self.num_kv_heads // 2 * self.group_size
        half = whole or self.num_heads // 2
        return (0, half), (half, self.num_heads)

    def tiles(self, q_owner: int, kv_owner: int) -> tuple[Tile, ...]:
        """What ``q_owner``'s queries see of ``kv_owner``'s keys."""
        return self._tiles[q_owner][kv_owner]

    def kv_heads(self, heads: Heads) -> Heads:
        """KV heads that a range of query heads reads."""
        return heads[0] // self.group_size, -(-heads[1] // self.group_size)

    @cached_property
    def num_q(self) -> tuple[int, ...]:
        """Queries of each rank."""
        return tuple(count_tokens(spans) for spans in self.q_layout)

    @cached_property
    def num_kv(self) -> tuple[int, ...]:
        """Keys of each rank."""
        return tuple(count_tokens(spans) for spans in self.kv_layout)

    @cached_property
    def _tiles(self) -> list[list[tuple[Tile, ...]]]:
        return [[make_tiles(self.mask, q, kv) for kv in self.kv_layout] for q in self.q_layout]


def make_problem(
    mask: Mask,
    num_q: int,
    num_kv: int,
    heads: tuple[int, int, int],
    *,
    world_size: int,
    layout: str = "zigzag",
    batch_size: int = 1,
    element_size: int = 4,
    num_nodes: int = 1,
    layout_cu_seqlens: Sequence[int] | None = None,
) -> Problem:
    """``num_q`` queries at the end of ``num_kv`` keys; a rank's keys are its part of the prefix, then its queries'.

    Args:
        mask: over the keys' positions.
        num_q, num_kv: over all ranks.
        heads: query heads, KV heads, head dim.
        world_size: ranks.
        layout: a name of ``parallel.layout.LAYOUTS``.
        batch_size, element_size, num_nodes: see ``Problem``.
        layout_cu_seqlens: what ``layout`` was cut by; None: the mask's documents.

    Raises:
        ValueError: for numbers that do not go together.
    """
    if num_kv < num_q:
        raise ValueError(f"{num_q} queries and {num_kv} keys over all ranks are not allowed: at least as many keys")
    if num_nodes < 1:
        raise ValueError(f"num_nodes={num_nodes} is not allowed: at least 1")
    if heads[0] % heads[1]:
        raise ValueError(f"{heads[0]} query heads and {heads[1]} KV heads are not allowed: a multiple")
    prefix, bounds = num_kv - num_q, check_cu_seqlens(mask.cu_seqlens, num_kv)
    bounds = check_cu_seqlens(layout_cu_seqlens, num_kv) or bounds
    q_layout = make_layout(layout, num_q, world_size, cu_seqlens=bounds, offset=prefix)
    before = None if bounds is None else [min(bound, prefix) for bound in bounds]
    kv_layout = join_layouts([make_layout(layout, prefix, world_size, cu_seqlens=before), q_layout])
    return Problem(mask, q_layout, kv_layout, *heads, batch_size, element_size, num_nodes)


@dataclass(frozen=True, slots=True)
class Work:
    """``rank`` attends queries of ``q_owner`` to keys of ``kv_owner`` in ``step``."""

    rank: int
    step: int
    q_owner: int
    kv_owner: int
    heads: Heads
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """Rows of ``owner``'s queries or keys travel from ``source``, which holds them, to ``destination``."""

    step: int
    kind: str  # "q" or "kv"
    owner: int
    source: int
    destination: int
    heads: Heads  # of queries
    rows: Rows


@dataclass(frozen=True, slots=True)
class Return:
    """Partial results on rows of ``owner`` go home from ``source`` after ``step``, the last one that adds to them."""

    step: int
    kind: str  # "q": partial output or dQ; "kv": dK and dV
    owner: int
    source: int
    heads: Heads
    rows: Rows


@dataclass(frozen=True)
class Plan:
    """Works and moves in the order of their steps; ``may_keep``: see ``keeps``."""

    name: str
    problem: Problem
    works: tuple[Work, ...]
    moves: tuple[Move, ...]
    may_keep: bool = True

    @cached_property
    def num_steps(self) -> int:
        """Steps; at least one."""
        return 1 + max((item.step for item in (*self.works, *self.moves)), default=0)

    @cached_property
    def q_returns(self) -> tuple[Return, ...]:
        """Partial outputs (forward) and dQ (backward) that were made away from home."""
        return self._returns("q")

    @cached_property
    def kv_returns(self) -> tuple[Return, ...]:
        """dK and dV (backward) that were made away from home."""
        return self._returns("kv")

    def works_of(self, rank: int) -> list[Work]:
        """What ``rank`` computes."""
        return self._works_by_rank[rank]

    @cached_property
    def keeps(self) -> bool:
        """Whether ranks keep for the backward what the forward brought them, which then does not travel again: where
        that is no more than they hold themselves, and allowed."""
        if not self.may_keep:
            return False
        problem, received = self.problem, [0] * self.problem.world_size
        for move in self.moves:
            received[move.destination] += self.move_bytes(move)
        row_bytes = problem.batch_size * problem.head_dim * problem.element_size
        return all(
            received[rank] <= row_bytes * (num_q * problem.num_heads + 2 * num_kv * problem.num_kv_heads)
            for rank, (num_q, num_kv) in enumerate(zip(problem.num_q, problem.num_kv, strict=True))
        )

    def moves_in(self, *, backward: bool) -> tuple[Move, ...]:
        """The moves of one direction of the computation."""
        return self._moves_by_direction[backward]

    def folded_after(self, step: int, *, backward: bool) -> int:
        """Returns of steps below this are waited for at the end of ``step``: while there are moves to come, so that
        returns do not pile up; after the last move waiting would only hold up the next returns."""
        moves = self.moves_in(backward=backward)
        return max(0, step - 1) if moves and step < moves[-1].step else 0

    def moves_of(self, rank: int, *, backward: bool) -> list[Move]:
        """What ``rank`` sends or receives."""
        return self._moves_by_rank[backward][rank]

    def returns_of(self, rank: int, *, backward: bool) -> list[Return]:
        """What ``rank`` sends home or is sent home to it."""
        return self._returns_by_rank[backward][rank]

    @cached_property
    def tags(self) -> dict[Move | Return, int]:
        """A number for each message, the same on all ranks."""
        return {item: tag for tag, item in enumerate((*self.moves, *self.returns(backward=True)))}

    def move_bytes(self, move: Move, *, backward: bool = False) -> int:
        """Payload of one move: K and V; or Q; in the backward dO, log-sum-exp, delta, and Q unless kept."""
        problem = self.problem
        rows = count_rows(move.rows) * problem.batch_size
        if move.kind == "kv":
            low, high = problem.kv_heads(move.heads)
            return 2 * rows * (high - low) * problem.head_dim * problem.element_size
        num_heads = move.heads[1] - move.heads[0]
        row_bytes = num_heads * problem.head_dim * problem.element_size
        if not backward:
            return rows * row_bytes
        return rows * ((1 if self.keeps else 2) * row_bytes + 2 * num_heads * problem.accumulator_size)

    def return_bytes(self, back: Return, *, backward: bool = False) -> int:
        """Payload of one return: output and log-sum-exp; dQ; or dK and dV."""
        problem = self.problem
        rows = count_rows(back.rows) * problem.batch_size
        if back.kind == "kv":
            low, high = problem.kv_heads(back.heads)
            return 2 * rows * (high - low) * problem.head_dim * problem.accumulator_size
        num_heads = back.heads[1] - back.heads[0]
        return rows * num_heads * (problem.head_dim + (0 if backward else 1)) * problem.accumulator_size

    def returns(self, *, backward: bool = False) -> tuple[Return, ...]:
        """What goes home in one direction of the computation."""
        return self.q_returns + self.kv_returns if backward else self.q_returns

    def bytes_between(self, *, backward: bool = False) -> dict[tuple[int, int], int]:
        """Payload bytes by (source, destination)."""
        sums: dict[tuple[int, int], int] = defaultdict(int)
        for move in self.moves_in(backward=backward):
            sums[move.source, move.destination] += self.move_bytes(move, backward=backward)
        for back in self.returns(backward=backward):
            sums[back.source, back.owner] += self.return_bytes(back, backward=backward)
        return dict(sums)

    @cached_property
    def _works_by_rank(self) -> defaultdict[int, list[Work]]:
        by_rank: defaultdict[int, list[Work]] = defaultdict(list)
        for work in self.works:
            by_rank[work.rank].append(work)
        return by_rank

    @cached_property
    def _moves_by_direction(self) -> tuple[tuple[Move, ...], tuple[Move, ...]]:
        return self.moves, tuple(move for move in self.moves if move.kind == "q") if self.keeps else self.moves

    @cached_property
    def _moves_by_rank(self) -> tuple[defaultdict[int, list[Move]], defaultdict[int, list[Move]]]:
        both = (defaultdict(list), defaultdict(list))
        for moves, by_rank in zip(self._moves_by_direction, both, strict=True):
            for move in moves:
                by_rank[move.source].append(move)
                by_rank[move.destination].append(move)
        return both

    @cached_property
    def _returns_by_rank(self) -> tuple[defaultdict[int, list[Return]], defaultdict[int, list[Return]]]:
        both = (defaultdict(list), defaultdict(list))
        for backward, by_rank in enumerate(both):
            for back in self.returns(backward=bool(backward)):
                by_rank[back.source].append(back)
                by_rank[back.owner].append(back)
        return both

    def _returns(self, kind: str) -> tuple[Return, ...]:
        steps: dict[tuple[int, int, Heads], int] = {}
        rows: dict[tuple[int, int, Heads], list[tuple[int, int]]] = defaultdict(list)
        for work in self.works:
            owner = work.q_owner if kind == "q" else work.kv_owner
            if owner != work.rank:
                key = (work.rank, owner, work.heads)
                steps[key] = max(work.step, steps.get(key, 0))
                rows[key] += rows_of(work.tiles, kind)
        made = (
            Return(step, kind, owner, source, heads, unite(rows[source, owner, heads]))
            for (source, owner, heads), step in steps.items()
        )
        return tuple(sorted(made, key=lambda back: (back.step, back.source, back.owner, back.heads)))


@dataclass(slots=True)
class PlanBuilder:
    """What a strategy fills in."""

    name: str
    problem: Problem
    _works: list[Work] = field(default_factory=list)
    _hops: list[Move] = field(default_factory=list)

    def compute(self, q_owner: int, kv_owner: int, *, rank: int, step: int, heads: Heads | None = None) -> None:
        """``rank`` computes this pair in ``step``; a pair that the mask empties is left out."""
        tiles = self.problem.tiles(q_owner, kv_owner)
        heads = heads or self.problem.all_heads
        if tiles and heads[0] < heads[1]:
            self._works.append(Work(rank, step, q_owner, kv_owner, heads, tiles))

    def hop(
        self, kind: str, owner: int, *, source: int, destination: int, step: int, heads: Heads | None = None
    ) -> None:
        """What ``destination`` and those behind it need of ``owner``'s rows travels there in ``step``."""
        if source != destination:
            self._hops.append(Move(step, kind, owner, source, destination, heads or self.problem.all_heads, ()))

    def finish(self) -> Plan:
        """The plan, without what nobody needs."""
        needed: dict[tuple[int, str, int, Heads], list[tuple[int, int]]] = defaultdict(list)
        for work in self._works:
            needed[work.rank, "q", work.q_owner, work.heads] += rows_of(work.tiles, "q")
            needed[work.rank, "kv", work.kv_owner, work.heads] += rows_of(work.tiles, "kv")
        moves: list[Move] = []
        for hop in sorted(self._hops, key=lambda hop: -hop.step):
            rows = unite(needed[hop.destination, hop.kind, hop.owner, hop.heads])
            if rows:
                needed[hop.source, hop.kind, hop.owner, hop.heads] += rows
                moves.append(
                    Move(hop.step, hop.kind, hop.owner, hop.source, hop.destination, hop.heads, rows),
                )
        moves.sort(key=lambda move: move.step)
        works = tuple(sorted(self._works, key=lambda work: (work.step, work.rank)))
        return Plan(self.name, self.problem, works, tuple(moves))


def by_step(items: Iterable[Any]) -> defaultdict[int, list[Any]]:
    """Works, moves or returns by their step, in their order."""
    steps: defaultdict[int, list[Any]] = defaultdict(list)
    for item in items:
        steps[item.step].append(item)
    return steps


def rows_of(tiles: Iterable[Tile], kind: str) -> list[tuple[int, int]]:
    """Row ranges that tiles touch, of queries or of keys."""
    if kind == "q":
        return [(tile.q_start, tile.q_stop) for tile in tiles]
    return [(tile.kv_start, tile.kv_stop) for tile in tiles]


def unite(ranges: Iterable[tuple[int, int]]) -> Rows:
    """Sorted, merged where they overlap or touch."""
    united: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if united and start <= united[-1][1]:
            united[-1] = united[-1][0], max(united[-1][1], stop)
        else:
            united.append((start, stop))
    return tuple(united)


def count_rows(rows: Rows) -> int:
    """Rows in all."""
    return sum(stop - start for start, stop in rows)
