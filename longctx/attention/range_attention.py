"""Attention of query rows to ranges of paged keys in plain torch, with log-sum-exp: on any device, for any KV order.

Blocks of keys are attended one after the other and merged by log-sum-exp, as in Flash-Decoding, so that the scores of a
long context never exist all at once. What an implementation without a kernel of its own for ranges runs.
Shape legend: S rows, R rows of a block, L keys of a block, K KV heads, G query heads per KV head, D head dim.
"""

import math
from itertools import pairwise

import torch

from longctx.attention.batch import AttentionShape, KeyRanges
from memory.page_rows import read_rows
from memory.pages import PagePool

ROW_BLOCK = 512  # a block of scores is float32 [heads, ROW_BLOCK, KEY_BLOCK]
KEY_BLOCK = 1024


def attend_key_ranges(
    q_SHD: torch.Tensor, shape: AttentionShape, ranges: KeyRanges, pool: PagePool, *, first_kv_head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``AttentionBackend.attend_ranges`` promises; float32 from the read of KV on."""
    q_SKGD = q_SHD.float().unflatten(1, (shape.num_kv_heads, -1))
    out_SKGD = torch.zeros_like(q_SKGD)
    lse_SKG = q_SKGD.new_full(q_SKGD.shape[:-1], -math.inf)
    kv_heads, size = (first_kv_head, first_kv_head + shape.num_kv_heads), pool.layout.page_size
    step = max(1, KEY_BLOCK // size) * size
    firsts, lasts = torch.stack((ranges.first_S, ranges.last_S)).tolist()
    borders = ranges.cu_seqlens_B1.tolist()
    for segment, (start, stop) in enumerate(pairwise(borders)):
        spans = _row_spans(firsts, lasts, start, stop)
        lowest, highest = _hull([(low, high) for _, low, high in spans])
        for key in range(lowest // size * size, highest, step):
            key_L = torch.arange(key, min(key + step, highest), device=q_SHD.device)
            slots_L = ranges.block_tables_BP[segment, key_L // size].long() * size + key_L % size
            k_LKD, v_LKD = (x.float() for x in read_rows(pool, shape.layer_idx, slots_L, kv_heads=kv_heads))
            for rows, low, high in spans:
                if low < key + step and key < high:
                    seen_RL = (key_L >= ranges.first_S[rows, None]) & (key_L < ranges.last_S[rows, None])
                    partial = _attend_block(q_SKGD[rows], k_LKD, v_LKD, seen_RL, shape.scale)
                    _merge_block_(out_SKGD[rows], lse_SKG[rows], *partial)
    return out_SKGD.flatten(1, 2), lse_SKG.flatten(1)


def _row_spans(firsts: list[int], lasts: list[int], start: int, stop: int) -> list[tuple[slice, int, int]]:
    """Blocks of a segment's rows, each with the keys that any of its rows sees; without blocks that see nothing."""
    blocks = [slice(row, min(row + ROW_BLOCK, stop)) for row in range(start, stop, ROW_BLOCK)]
    spans = [(rows, *_hull(list(zip(firsts[rows], lasts[rows], strict=True)))) for rows in blocks]
    return [span for span in spans if span[1] < span[2]]


def _hull(ranges: list[tuple[int, int]]) -> tuple[int, int]:
    """The smallest range that holds all the given ones; (0, 0) if they are empty."""
    filled = [(first, last) for first, last in ranges if first < last]
    return (min(first for first, _ in filled), max(last for _, last in filled)) if filled else (0, 0)


def _attend_block(
    q_RKGD: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, seen_RL: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a block of rows to a block of keys ``[R, K, G, D]``, and its log-sum-exp ``[R, K, G]``."""
    scores_KGRL = torch.einsum("rkgd,lkd->kgrl", q_RKGD, k_LKD).mul_(scale).masked_fill_(~seen_RL, -math.inf)
    highest_KGR1 = _finite(scores_KGRL.amax(-1, keepdim=True))
    weights_KGRL = scores_KGRL.sub_(highest_KGR1).exp_()
    sum_KGR1 = weights_KGRL.sum(-1, keepdim=True)
    out_RKGD = torch.einsum("kgrl,lkd->rkgd", weights_KGRL, v_LKD)
    divisor_KGR1 = sum_KGR1.masked_fill(sum_KGR1 == 0, 1.0)  # a row that sees nothing here stays zero
    return out_RKGD.div_(divisor_KGR1.permute(2, 0, 1, 3)), (sum_KGR1.log() + highest_KGR1)[..., 0].permute(2, 0, 1)


def _merge_block_(
    out_RKGD: torch.Tensor, lse_RKG: torch.Tensor, partial_out_RKGD: torch.Tensor, partial_lse_RKG: torch.Tensor
) -> None:
    """Add a block's result in place; unlike ``parallel.merge``, rows may have seen nothing in both."""
    lse_new = torch.logaddexp(lse_RKG, partial_lse_RKG)
    out_RKGD.mul_((lse_RKG - _finite(lse_new)).exp_()[..., None])
    out_RKGD.addcmul_(partial_out_RKGD, (partial_lse_RKG - _finite(lse_new)).exp_()[..., None])
    lse_RKG.copy_(lse_new)


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """``lse`` for use as a subtrahend: minus infinity taken from itself is no number."""
    return lse.clamp_min(torch.finfo(lse.dtype).min)
