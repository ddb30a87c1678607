"""Which blocks a token retrieves, and at which positions it sees them.

Mohtashami and Jaggi, 2023 (arXiv 2305.16300), section 3.2, with the "stingy" positions of its appendix: a token's own
block always lies behind k + 1 slots of earlier blocks. While landmarks are scored, the last k blocks are in slots 1
to k and all older ones in slot 0. Of the k blocks that score highest, sorted by age, number r is then seen in slot r
if it is an old one, and in slot r + 1 if it is one of the last k. Where there are fewer than k blocks, they lie
directly before the own one, as in training. What a token sees so depends on its own block and those before it alone,
never on how a prompt was cut into steps. Ties are the rule in the first layer, whose landmarks' keys are all the
same (``ranking.py``).

Legend: T rows, N blocks, K KV heads, G query heads per KV head, D head dim, k retrieved blocks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from longctx.attention.ranking import rank_scores

Turn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``(q [T, K, G, ..., D], number of slots)`` to q as it is that many slots further away; numbers broadcast to q's."""

TILE_SCORES = {"cpu": 1 << 18, "cuda": 1 << 24}  # that exist at one time: on a CPU, what stays in its caches


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How blocks are retrieved."""

    top_k: int = 4  # blocks that a token retrieves
    granularity: str = "head_token"  # who chooses: each head for each token, all heads together, or a block's tokens
    skip_below: float = 0.0  # nothing is looked at where all landmarks together would get less than this share


@dataclass(slots=True)
class Choice:
    """Blocks that rows retrieve: ``[T, K, G, k]`` each."""

    block: torch.Tensor  # int64; 0 where there is none
    is_there: torch.Tensor  # bool
    num_slots: torch.Tensor  # int64, from its slot to the own block's


def choose_blocks(
    q_TKGD: torch.Tensor,
    landmarks_NKD: torch.Tensor,
    block_T: torch.Tensor,
    run_T: torch.Tensor,
    retrieval: Retrieval,
    turn: Turn,
) -> Choice:
    """The blocks that each row retrieves.

    Args:
        q_TKGD: rotated by the position in the own block.
        landmarks_NKD: keys of the sequence's landmarks, rotated by their position in their block; ``[T, N, K, D]`` if
            every row has its own.
        block_T: own blocks.
        run_T: equal for neighbours that are of the same block of the same sequence.
        retrieval: how many, and who chooses.
        turn: see ``Turn``.
    """
    num_blocks = landmarks_NKD.shape[-3]
    num_rows = max(1, TILE_SCORES[q_TKGD.device.type] // (q_TKGD.shape[1] * q_TKGD.shape[2] * num_blocks))
    ranked = []
    for rows in _tiles(run_T, num_rows):
        landmarks = landmarks_NKD[rows] if landmarks_NKD.dim() == 4 else landmarks_NKD
        scores_TKGN = _score(q_TKGD[rows], landmarks, block_T[rows], retrieval.top_k, turn)
        ranked.append(rank_scores(_POOLING[retrieval.granularity](scores_TKGN, run_T[rows]), retrieval.top_k))
    return _place(torch.cat(ranked).expand(*q_TKGD.shape[:3], -1), block_T, retrieval.top_k)


def _tiles(run_T: torch.Tensor, num_rows: int) -> Iterator[slice]:
    """At most ``num_rows`` rows at a time, or one run."""
    if len(run_T) <= num_rows:
        yield slice(0, len(run_T))
        return
    start = 0
    ends = (torch.cat((run_T.diff(), run_T.new_ones(1))) != 0).nonzero()[:, 0].add(1).tolist()
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or following - start > num_rows:
            yield slice(start, end)
            start = end


def _score(
    q_TKGD: torch.Tensor, landmarks_NKD: torch.Tensor, block_T: torch.Tensor, top_k: int, turn: Turn
) -> torch.Tensor:
    """Scores without their scale ``[T, K, G, N]``; minus infinity for blocks that are not before the row's own."""
    equation = "tkgd,tnkd->tkgn" if landmarks_NKD.dim() == 4 else "tkgd,nkd->tkgn"
    num_blocks = landmarks_NKD.shape[-3]
    scores = torch.einsum(equation, turn(q_TKGD, block_T.new_tensor(top_k + 1)).float(), landmarks_NKD.float())
    recent_Tk = block_T[:, None] - torch.arange(1, top_k + 1, device=block_T.device)
    places_Tk = recent_Tk.clamp(0, num_blocks - 1)
    rows_T1 = torch.arange(len(block_T), device=block_T.device)[:, None]
    near_TkKD = landmarks_NKD[rows_T1, places_Tk] if landmarks_NKD.dim() == 4 else landmarks_NKD[places_Tk]
    turned_TKGkD = turn(
        q_TKGD.unsqueeze(3).expand(-1, -1, -1, top_k, -1), torch.arange(1, top_k + 1, device=block_T.device)
    )
    near_TKGk = torch.einsum("tkgnd,tnkd->tkgn", turned_TKGkD.float(), near_TkKD.float())
    # a place that is clamped belongs to another block: what is written there is of no block, and goes last
    column_Tk = torch.where(recent_Tk >= 0, places_Tk, num_blocks)
    wide = torch.cat((scores, scores.new_empty(*scores.shape[:3], 1)), -1)
    wide.scatter_(3, column_Tk[:, None, None].expand(near_TKGk.shape), near_TKGk)
    is_later = torch.arange(num_blocks, device=block_T.device) >= block_T[:, None]
    return wide[..., :-1].masked_fill(is_later[:, None, None], float("-inf"))


def _pool_tokens(scores_TKGN: torch.Tensor, run_T: torch.Tensor) -> torch.Tensor:
    """For each head the highest score over the rows of one block that are computed together."""
    _, number_T = run_T.unique_consecutive(return_inverse=True)
    highest = scores_TKGN.new_full((int(number_T[-1]) + 1, *scores_TKGN.shape[1:]), float("-inf"))
    index = number_T[:, None, None, None].expand(scores_TKGN.shape)
    return highest.scatter_reduce_(0, index, scores_TKGN, "amax")[number_T]


_POOLING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "head_token": lambda scores, _: scores,
    "token": lambda scores, _: scores.amax((1, 2), keepdim=True),
    "head": _pool_tokens,
}


def _place(block: torch.Tensor, block_T: torch.Tensor, top_k: int) -> Choice:
    """Slots by age. What is missing counts as older than all, so that fewer than k end up next to the own one."""
    is_there, rank = block >= 0, torch.arange(top_k, device=block.device)
    is_recent = block >= (block_T - top_k)[:, None, None, None]
    return Choice(block.clamp_min(0), is_there, top_k + 1 - (rank + is_recent.long()))
