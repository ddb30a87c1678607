"""Attention straight from the formula, in float64, with the mask written out entry by entry."""

import torch

from parallel.mask import Mask


def visible_entries(mask: Mask, q_positions: torch.Tensor, kv_positions: torch.Tensor) -> torch.Tensor:
    """Bool ``[S, L]``: which query sees which key, from the definition."""
    i, j = q_positions[:, None], kv_positions[None]
    visible = torch.ones(len(q_positions), len(kv_positions), dtype=torch.bool)
    if mask.causal:
        visible &= j <= i
    if mask.window is not None:
        first = torch.zeros_like(i)
        if mask.cu_seqlens is not None:
            bounds = torch.tensor(mask.cu_seqlens)
            first = bounds[(torch.bucketize(i, bounds[1:], right=True)).clamp_max(len(bounds) - 2)]
        edge = (i - first + 1 - mask.window).div(mask.window_group, rounding_mode="floor") * mask.window_group
        visible &= j - first >= edge
    if mask.cu_seqlens is not None:
        ends = torch.tensor(mask.cu_seqlens[1:])
        visible &= torch.bucketize(i, ends, right=True) == torch.bucketize(j, ends, right=True)
    return visible


def dense_attention(
    q_BSHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, mask: Mask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, S, H, D]`` and log-sum-exp ``[B, H, S]``; the queries are the last of the keys' positions."""
    num_q, num_kv, group_size = q_BSHD.shape[1], k_BLKD.shape[1], q_BSHD.shape[2] // k_BLKD.shape[2]
    q, k, v = q_BSHD.double(), *(x.double().repeat_interleave(group_size, 2) for x in (k_BLKD, v_BLKD))
    visible = visible_entries(mask, torch.arange(num_kv - num_q, num_kv), torch.arange(num_kv))
    scores = (torch.einsum("bihd,bjhd->bhij", q, k) * scale).masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None]).nan_to_num(0)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse
