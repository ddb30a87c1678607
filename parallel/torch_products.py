"""Attention of one block as two products and a softmax, anywhere: what a GPU runs for masks that flash kernels lack.

A block's scores exist at one time, in float32: a few hundred rows of a window (``BAND_ROWS``). Products of half
precision are in half precision, with sums in float32.

Legend: B batch, S queries, L keys, H query heads, K KV heads, G = H / K, D head dim.
"""

import torch

from parallel.tile_attention import (
    Block,
    TileKernel,
    accumulator_dtype,
    clear_empty_rows_,
    make_block_mask,
)


class TorchProducts(TileKernel):
    """Any device, floating dtype and head dim."""

    def forward(
        self, q_BSHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, block: Block, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores_BKGSL, hidden = _score(q_BSHD, k_BLKD, block, scale)
        lse_BKGS = scores_BKGSL.logsumexp(-1)
        if hidden is not None:
            lse_BKGS = lse_BKGS.masked_fill(hidden.all(1), 0.0)
        weights = torch.exp(scores_BKGSL - lse_BKGS[..., None]).to(v_BLKD.dtype)
        out_BSHD = _ungrouped(weights @ v_BLKD.permute(0, 2, 1, 3)[:, :, None]).to(lse_BKGS.dtype)
        lse_BSH = _ungrouped(lse_BKGS[..., None])[..., 0]
        if hidden is not None and block.stairs is not None:
            clear_empty_rows_(hidden.all(1), out_BSHD, lse_BSH)
        return out_BSHD, lse_BSH

    def backward(
        self,
        dout_BSHD: torch.Tensor,
        q_BSHD: torch.Tensor,
        k_BLKD: torch.Tensor,
        v_BLKD: torch.Tensor,
        lse_BSH: torch.Tensor,
        delta_BSH: torch.Tensor,
        block: Block,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_kv_heads, dtype = k_BLKD.shape[2], q_BSHD.dtype
        scores_BKGSL, _ = _score(q_BSHD, k_BLKD, block, scale)
        dout, q = (_grouped(x, num_kv_heads) for x in (dout_BSHD.to(dtype), q_BSHD))
        lse, delta = (_grouped(x[..., None], num_kv_heads) for x in (lse_BSH, delta_BSH))
        k, v = (x.permute(0, 2, 1, 3)[:, :, None] for x in (k_BLKD, v_BLKD))
        weights = torch.exp(scores_BKGSL - lse)
        dscores = (weights * ((dout @ v.mT).to(weights.dtype) - delta) * scale).to(dtype)
        dq = _ungrouped(dscores @ k)
        dk, dv = (
            (left.mT @ right).sum(2).permute(0, 2, 1, 3) for left, right in ((dscores, q), (weights.to(dtype), dout))
        )
        return dq, dk, dv


def _score(
    q_BSHD: torch.Tensor, k_BLKD: torch.Tensor, block: Block, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores ``[B, K, G, S, L]`` in the accumulator's dtype, and what is hidden."""
    products = _grouped(q_BSHD, k_BLKD.shape[2]) @ k_BLKD.permute(0, 2, 3, 1)[:, :, None]
    scores = products.to(accumulator_dtype(q_BSHD.dtype)) * scale
    hidden = make_block_mask(block, q_BSHD.device)
    if block.is_causal:
        hidden = torch.ones(scores.shape[3:], dtype=torch.bool, device=scores.device).triu(1)
    return scores if hidden is None else scores.masked_fill(hidden, float("-inf")), hidden


def _grouped(x_BSHD: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[B, S, K * G, D]`` as ``[B, K, G, S, D]``."""
    return x_BSHD.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _ungrouped(x_BKGSD: torch.Tensor) -> torch.Tensor:
    """``[B, K, G, S, D]`` as ``[B, S, K * G, D]``."""
    return x_BKGSD.permute(0, 3, 1, 2, 4).flatten(2, 3)
