"""How many bytes a rank's part of a plan keeps beside the rank's own tensors: the executor's buffers, played through.

What arrives is there from the step that posts it until the last work or move that needs it; partial results for others
from the first work that adds to them until they are sent; what is sent, packed, until the step is over.
"""

from collections import defaultdict
from dataclasses import dataclass

from parallel.plan import Heads, Move, Plan, by_step

_Key = tuple[str, int, Heads]  # kind, owner, query heads


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one rank in one direction of a plan."""

    peak: int  # at the fullest step
    kept: int  # of what arrived and stays for the backward


def count_buffers(plan: Plan, rank: int, *, backward: bool) -> Footprint:
    """The buffers of ``rank``; in the backward without what the forward kept."""
    last_use = _find_last_uses(plan, rank, backward=backward)
    moves, returns = by_step(plan.moves_of(rank, backward=backward)), by_step(plan.returns_of(rank, backward=backward))
    begins = _find_first_sums(plan, rank)
    keeps = plan.keeps and not backward
    held: dict[_Key, int] = {}
    sums: dict[_Key, int] = {}
    homecoming: dict[int, int] = defaultdict(int)  # by the step that posted it
    peak = kept = 0
    for step in range(plan.num_steps + 1):
        sent = 0
        for move in moves[step]:
            num_bytes = plan.move_bytes(move, backward=backward)
            if move.destination == rank:
                held[_key(move)] = num_bytes
                kept += num_bytes if keeps else 0
            else:
                sent += num_bytes
        for back in returns[step - 1]:
            num_bytes = plan.return_bytes(back, backward=backward)
            if back.owner == rank:
                homecoming[step - 1] += num_bytes
            else:
                sent += sums.pop((back.kind, back.owner, back.heads), num_bytes)
        for back in plan.returns_of(rank, backward=backward):
            if back.source == rank and begins.get((back.kind, back.owner, back.heads)) == step:
                sums[back.kind, back.owner, back.heads] = plan.return_bytes(back, backward=backward)
        own = sum(held.values()) + sum(sums.values()) + sum(homecoming.values()) + sent
        peak = max(peak, own)
        folded = plan.folded_after(step, backward=backward)
        homecoming = defaultdict(int, {at: size for at, size in homecoming.items() if at >= folded})
        if not keeps:
            held = {key: size for key, size in held.items() if last_use[key] > step}
    return Footprint(peak, kept)


def _key(move: Move) -> _Key:
    return move.kind, move.owner, move.heads


def _find_last_uses(plan: Plan, rank: int, *, backward: bool) -> dict[_Key, int]:
    uses: dict[_Key, int] = defaultdict(int)
    for work in plan.works_of(rank):
        for kind, owner in (("q", work.q_owner), ("kv", work.kv_owner)):
            uses[kind, owner, work.heads] = max(uses[kind, owner, work.heads], work.step)
    for move in plan.moves_of(rank, backward=backward):
        if move.source == rank:
            uses[_key(move)] = max(uses[_key(move)], move.step)
    return uses


def _find_first_sums(plan: Plan, rank: int) -> dict[_Key, int]:
    """Steps in which partial results for another rank are begun."""
    begins: dict[_Key, int] = {}
    for work in plan.works_of(rank):
        for kind, owner in (("q", work.q_owner), ("kv", work.kv_owner)):
            if owner != rank:
                begins.setdefault((kind, owner, work.heads), work.step)
    return begins
