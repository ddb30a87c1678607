"""Landmark attention as matrix products, a tile of queries at a time, on any device.

The formulas are those of ``longctx/attention/landmark.py``. Forward and backward work on a tile of queries at a time;
the backward needs of the forward no more than each query's log-sum-exp, and all else is a tile's own. The queries may
be a part of the sequence's, as a rank has them that shares it with others.

Legend: S queries, L tokens of the sequence, H query heads, K KV heads, G = H / K, D head dim, M blocks, P tokens of a
padded block, its landmark last; R queries of a tile.
"""

from dataclasses import dataclass
from typing import Any

import torch

from longctx.attention.landmark_blocks import Blocks

TILE_ROWS = 128  # queries of a tile: more would leave the caches, and causal work undone is saved
TILE_SCORES = 1 << 24  # that exist at one time, at most


class LandmarkProducts:
    """One sequence, a tile of queries after another, every KV head in one product.

    Args:
        q_SHD: queries, all of the sequence's or some, rotated already.
        k_LKD, v_LKD: keys and values of the whole sequence.
        blocks: of the sequence.
        scale: of the scores.
        positions_S: rising, where the queries stand in the sequence; None: they are all of it.
    """

    def __init__(
        self,
        q_SHD: torch.Tensor,
        k_LKD: torch.Tensor,
        v_LKD: torch.Tensor,
        blocks: Blocks,
        scale: float,
        positions_S: torch.Tensor | None = None,
    ) -> None:
        self._dtype = torch.float64 if q_SHD.dtype == torch.float64 else torch.float32
        self._device, self._blocks, self._scale = q_SHD.device, blocks, scale
        self._num, (self._num_keys, self._num_kv_heads) = len(q_SHD), k_LKD.shape[:2]
        self._q_KGSD = self._group(q_SHD)
        rows = blocks.rows_MP.to(self._device)
        self._k_KMPD, self._v_KMPD = (x.to(self._dtype)[rows].permute(2, 0, 1, 3) for x in (k_LKD, v_LKD))
        tables = blocks.block_S, blocks.seen_S, blocks.first_S
        if positions_S is not None:
            tables = [x[positions_S.cpu()] for x in tables]
        self._block_S, self._seen_S, self._first_S = (x.to(self._device) for x in tables)
        self._firsts, self._lasts = (x.tolist() for x in (tables[2], tables[0]))  # what tiles begin and end with
        slots = torch.arange(blocks.size, device=self._device)
        self._is_normal_MP = slots < blocks.lengths_M.to(self._device)[:, None]

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[S, H, D]`` and log-sum-exp ``[K, G, S]``."""
        out_KGSD = torch.empty_like(self._q_KGSD)
        lse_KGS = self._q_KGSD.new_empty(self._q_KGSD.shape[:3])
        for rows, blocks in self._tiles():
            tile = self._score(rows, blocks)
            changed_KGRMP = tile.changed
            lse_KGS[:, :, rows] = changed_KGRMP.flatten(3).logsumexp(-1)
            weights = torch.exp(changed_KGRMP - lse_KGS[:, :, rows, None, None]).flatten(3).flatten(1, 2)
            out = weights @ self._v_KMPD[:, blocks].flatten(1, 2)
            out_KGSD[:, :, rows] = out.unflatten(1, (-1, rows.stop - rows.start))
        return self._ungroup(out_KGSD), lse_KGS

    def backward(self, dout_SHD: Any, out_SHD: Any, lse_KGS: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq ``[S, H, D]``, dk and dv ``[L, K, D]``."""
        dout_KGSD = self._group(dout_SHD)
        delta_KGS = (dout_KGSD * self._group(out_SHD)).sum(-1)
        dq_KGSD = torch.empty_like(self._q_KGSD)
        dk_KMPD, dv_KMPD = torch.zeros_like(self._k_KMPD), torch.zeros_like(self._v_KMPD)
        for rows, blocks in self._tiles():
            tile, num_rows = self._score(rows, blocks), rows.stop - rows.start
            p_KGRMP = torch.exp(tile.changed - lse_KGS[:, :, rows, None, None])
            dout, q = (x[:, :, rows].flatten(1, 2) for x in (dout_KGSD, self._q_KGSD))
            k, v = (x[:, blocks].flatten(1, 2) for x in (self._k_KMPD, self._v_KMPD))
            shape = (-1, num_rows), (-1, self._blocks.size)
            dp_KGRMP = (dout @ v.mT).unflatten(1, shape[0]).unflatten(3, shape[1])
            # of the changed scores; a block's own softmax takes off what all its tokens have in common
            dscores = p_KGRMP * (dp_KGRMP - delta_KGS[:, :, rows, None, None])
            in_block = dscores.sum(-1)
            dscores = dscores - torch.where(tile.is_earlier, tile.inner * in_block[..., None], 0)
            dscores[..., -1] = torch.where(tile.is_earlier[..., 0], in_block, 0)
            dscores = dscores.flatten(3).flatten(1, 2) * self._scale
            dq_KGSD[:, :, rows] = (dscores @ k).unflatten(1, shape[0])
            dk_KMPD[:, blocks] += (dscores.mT @ q).unflatten(1, shape[1])
            dv_KMPD[:, blocks] += (p_KGRMP.flatten(3).flatten(1, 2).mT @ dout).unflatten(1, shape[1])
        return self._ungroup(dq_KGSD), self._scatter(dk_KMPD, has_landmarks=True), self._scatter(dv_KMPD)

    def _tiles(self) -> Any:
        """Rows, and the blocks that some of them see."""
        num_heads = self._q_KGSD.shape[0] * self._q_KGSD.shape[1]
        width = len(self._is_normal_MP) * self._blocks.size * num_heads
        num_rows = max(1, min(TILE_ROWS, TILE_SCORES // width))
        for start in range(0, self._num, num_rows):
            stop = min(start + num_rows, self._num)
            yield slice(start, stop), slice(self._firsts[start], self._lasts[stop - 1] + 1)

    def _score(self, rows: slice, blocks: slice) -> "_Tile":
        q = self._q_KGSD[:, :, rows].flatten(1, 2)
        scores = (q @ self._k_KMPD[:, blocks].flatten(1, 2).mT) * self._scale
        scores_KGRMP = scores.unflatten(1, (-1, rows.stop - rows.start)).unflatten(3, (-1, self._blocks.size))
        index_M = torch.arange(blocks.start, blocks.stop, device=self._device)
        own, first, seen = (x[rows, None] for x in (self._block_S, self._first_S, self._seen_S))
        is_earlier_RM1 = ((index_M < own) & (index_M >= first))[..., None]
        slots = torch.arange(self._blocks.size, device=self._device)
        is_seen_RMP = (index_M == own)[..., None] & (slots < seen[..., None])
        inner = scores_KGRMP.masked_fill(~self._is_normal_MP[blocks], float("-inf"))
        inner_lse = inner.logsumexp(-1, keepdim=True)
        inner = inner - inner_lse
        hidden = torch.where(is_seen_RMP, scores_KGRMP, float("-inf"))
        changed = torch.where(is_earlier_RM1, inner + scores_KGRMP[..., -1:], hidden)
        return _Tile(changed, torch.exp(inner), is_earlier_RM1)

    def _group(self, x_SHD: torch.Tensor) -> torch.Tensor:
        return x_SHD.to(self._dtype).unflatten(1, (self._num_kv_heads, -1)).permute(1, 2, 0, 3).contiguous()

    def _ungroup(self, x_KGSD: torch.Tensor) -> torch.Tensor:
        return x_KGSD.permute(2, 0, 1, 3).flatten(1, 2)

    def _scatter(self, x_KMPD: torch.Tensor, *, has_landmarks: bool = False) -> torch.Tensor:
        """Gradients of slots to those of tokens ``[L, K, D]``; empty slots are left out."""
        is_used = self._is_normal_MP.clone()
        rows = self._blocks.rows_MP.to(self._device)
        is_used[:, -1] = (rows[:, -1] > 0) & has_landmarks
        out_LKD = x_KMPD.new_zeros(self._num_keys, self._num_kv_heads, x_KMPD.shape[-1])
        return out_LKD.index_copy_(0, rows[is_used], x_KMPD.permute(1, 2, 0, 3)[is_used])


@dataclass(slots=True)
class _Tile:
    """Scores of a tile of queries."""

    changed: torch.Tensor  # [K, G, R, M, P], minus infinity where nothing is seen
    inner: torch.Tensor  # the softmax inside each block, over its normal tokens
    is_earlier: torch.Tensor  # [R, M, 1]: blocks that are seen through their landmark
