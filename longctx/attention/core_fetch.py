"""Exact recall under CCA attention: the groups that may score highest are seen token by token.

Each query head of each token fetches, among the cores that the token sees, N, and sees their groups' tokens instead of
them: one softmax over the other cores, the fetched tokens and the window, in which no token counts twice. With N at
least the number of cores this is dense attention. Tokens come from the sequence's pages where it still has them, and
from the pages below else (``memory/lower_pages.py``).

Which groups: a core is a mean, in which one key that matches is lost. So each group has the least and the greatest
value of its rotated keys by dimension, as Quest does for pages (Tang et al., 2024, arXiv 2406.10774, section 3.2), and
those N are fetched whose bound on any token's score is the highest. Bounds are stored as a key (least) and a value
(greatest) beside the cores.

Legend: T tokens in the batch, R rows of a tile, N cores, F fetched groups, g tokens of a group, M = F * g, U distinct
tokens of a tile, K KV heads, G query heads per KV head, H = K * G, D head dim.
"""

from collections.abc import Callable

import torch

from longctx.attention.batch import AttentionShape, PackedBatch
from longctx.attention.core_batch import CoreSegment
from longctx.attention.landmark_retrieval import rank_scores
from memory.lower_pages import LowerPages
from memory.page_rows import read_rows, write_rows
from memory.pages import PagePool
from parallel.merge import merge_partial_

TILE_ELEMENTS = 1 << 23  # of the largest intermediate


class CoreFetch:
    """Attention to cores, and to the tokens of the best ones.

    Args:
        num_groups: N, at least 1.
        below: where pages are that sequences no longer have.
    """

    def __init__(self, num_groups: int, below: LowerPages) -> None:
        self._num_groups, self._below = num_groups, below

    def merge_(
        self,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor,
        q_THD: torch.Tensor,
        shape: AttentionShape,
        batch: PackedBatch,
    ) -> None:
        """Add what every token sees beyond its window to float32 ``out_THD`` and ``lse_TH``, which have seen that."""
        assert batch.cores is not None
        for segment in batch.cores.segments:
            cores = read_rows(batch.pool, shape.layer_idx, segment.core_slots_N)
            k_KND, v_KND = (x.float().transpose(0, 1) for x in cores)
            bounds_KND = _read_bounds(batch.pool, shape.layer_idx, segment.bound_slots_N)
            number_N = torch.arange(len(segment.core_slots_N), device=q_THD.device)
            size = max(len(segment.core_slots_N), self._num_groups * segment.group_size * shape.head_dim)
            num_rows = max(1, TILE_ELEMENTS // (shape.num_heads * size))
            for start in range(segment.rows.start, segment.rows.stop, num_rows):
                rows = slice(start, min(start + num_rows, segment.rows.stop))
                q_RKGD = q_THD[rows].float().unflatten(1, (shape.num_kv_heads, -1))
                is_later_RN = number_N >= batch.cores.num_cores_T[rows, None]
                chosen_RKGF = self._choose(q_RKGD, bounds_KND, is_later_RN, shape.scale)
                self._see_cores(out_THD[rows], lse_TH[rows], q_RKGD, k_KND, v_KND, is_later_RN, chosen_RKGF, shape)
                self._see_tokens(out_THD[rows], lse_TH[rows], q_RKGD, chosen_RKGF, segment, shape, batch.pool)

    def _choose(
        self, q_RKGD: torch.Tensor, bounds_KND: torch.Tensor, is_later_RN: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Groups that are fetched, -1 for none; bounds are ``[K, N, 2 * D]``."""
        split = torch.cat((q_RKGD.clamp_max(0), q_RKGD.clamp_min(0)), -1)  # least values meet what is negative
        bound_RKGN = torch.einsum("rkgd,knd->rkgn", split, bounds_KND).mul_(scale)
        return rank_scores(bound_RKGN.masked_fill_(is_later_RN[:, None, None], float("-inf")), self._num_groups)

    def _see_cores(
        self,
        out_RHD: torch.Tensor,
        lse_RH: torch.Tensor,
        q_RKGD: torch.Tensor,
        k_KND: torch.Tensor,
        v_KND: torch.Tensor,
        is_later_RN: torch.Tensor,
        chosen_RKGF: torch.Tensor,
        shape: AttentionShape,
    ) -> None:
        """Add the cores that are not fetched."""
        scores_RKGN = torch.einsum("rkgd,knd->rkgn", q_RKGD, k_KND).mul_(shape.scale)
        scores_RKGN.masked_fill_(is_later_RN[:, None, None], float("-inf"))
        # Where one is none, every core that is seen is fetched, the first as well.
        scores_RKGN.scatter_(-1, chosen_RKGF.clamp_min(0), float("-inf"))
        _merge(out_RHD, lse_RH, scores_RKGN, lambda weights: torch.einsum("rkgn,knd->rkgd", weights, v_KND))

    def _see_tokens(
        self,
        out_RHD: torch.Tensor,
        lse_RH: torch.Tensor,
        q_RKGD: torch.Tensor,
        chosen_RKGF: torch.Tensor,
        segment: CoreSegment,
        shape: AttentionShape,
        pool: PagePool,
    ) -> None:
        """Add the tokens of the groups that are fetched."""
        inner_g = torch.arange(segment.group_size, device=q_RKGD.device)
        token_RKGM = (chosen_RKGF.clamp_min(0)[..., None] * segment.group_size + inner_g).flatten(3)
        is_there_RKGM = (chosen_RKGF >= 0).repeat_interleave(segment.group_size, -1)
        token_U, place_RKGM = token_RKGM.unique(return_inverse=True)
        k_UKD, v_UKD = self._read(token_U, segment, shape.layer_idx, pool)
        head_K11 = torch.arange(shape.num_kv_heads, device=q_RKGD.device)[:, None, None]
        k_RKGMD = k_UKD[place_RKGM, head_K11].float()
        scores_RKGM = torch.einsum("rkgd,rkgmd->rkgm", q_RKGD, k_RKGMD).mul_(shape.scale)
        scores_RKGM.masked_fill_(~is_there_RKGM, float("-inf"))
        v_RKGMD = v_UKD[place_RKGM, head_K11].float()
        _merge(out_RHD, lse_RH, scores_RKGM, lambda weights: torch.einsum("rkgm,rkgmd->rkgd", weights, v_RKGMD))

    def _read(
        self, token_U: torch.Tensor, segment: CoreSegment, layer_idx: int, pool: PagePool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[U, K, D]`` of a sequence's tokens, ascending."""
        size = pool.layout.page_size
        page_U, offset_U = token_U // size, token_U % size
        num_below = int((page_U < segment.num_passed).sum())
        near_U = segment.table_P[page_U[num_below:] - segment.num_passed] * size + offset_U[num_below:]
        parts = [read_rows(pool, layer_idx, near_U)] if len(near_U) else []
        if num_below:
            pages, place_U = page_U[:num_below].unique_consecutive(return_inverse=True)
            kept = [int(segment.kept[page]) for page in pages.tolist()]
            found = self._below.read(layer_idx, kept, token_U.device)
            parts.insert(0, read_rows(found, 0, place_U * size + offset_U[:num_below]))
        k_UKD, v_UKD = (torch.cat(rows) for rows in zip(*parts, strict=True))
        return k_UKD, v_UKD


def write_bounds(pool: PagePool, layer_idx: int, slots_N: torch.Tensor, k_NgKD: torch.Tensor) -> None:
    """Store the bounds of groups with these rotated keys."""
    write_rows(pool, layer_idx, slots_N, k_NgKD.amin(1), k_NgKD.amax(1))


def _read_bounds(pool: PagePool, layer_idx: int, slots_N: torch.Tensor) -> torch.Tensor:
    """Least values, then greatest ones ``[K, N, 2 * D]``."""
    return torch.cat(read_rows(pool, layer_idx, slots_N), -1).float().transpose(0, 1)


def _merge(
    out_RHD: torch.Tensor,
    lse_RH: torch.Tensor,
    scores_RKGX: torch.Tensor,
    weigh: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Merge softmax of ``scores_RKGX``, which it overwrites, into what rows have seen; a row may see nothing here."""
    lse_RKG1 = scores_RKGX.logsumexp(-1, keepdim=True)
    finite = lse_RKG1.masked_fill(lse_RKG1 == float("-inf"), 0.0)
    part_RKGD = weigh(scores_RKGX.sub_(finite).exp_())
    merge_partial_(out_RHD[None], lse_RH[None], part_RKGD.flatten(1, 2)[None], lse_RKG1.flatten(1)[None])
