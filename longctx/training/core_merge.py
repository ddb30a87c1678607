"""Attention that has seen a window of tokens, and now sees cores of far ones, too, in one softmax.

With P over both, out = P_window out_window + P_cores V, and the gradients of a softmax over both: that by a score is P
(dP - delta), that by the window's log-sum-exp the same with the window's output as its value. Scores exist for a tile
of queries at a time.

Legend: S queries, R of a tile, N cores, C of those that a tile sees, H query heads, K KV heads, G = H / K, D head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

TILE_ROWS = 128  # queries of a tile: more would leave the caches, and causal work undone is saved
TILE_SCORES = 1 << 24  # that exist at one time, at most


class MergeCores(torch.autograd.Function):
    """``(q [S, H, D], core_k, core_v [N, K, D], out [S, H, D], lse [S, H], first, num, scale)`` to out with cores.

    q and the cores' keys are rotated. ``first`` and ``num``, int64 ``[S]`` on the CPU: the query sees the cores
    ``first`` to ``first + num - 1``; both rise, but that ``num`` begins again with each document.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_SHD: torch.Tensor,
        core_k_NKD: torch.Tensor,
        core_v_NKD: torch.Tensor,
        out_SHD: torch.Tensor,
        lse_SH: torch.Tensor,
        first_S: torch.Tensor,
        num_S: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q_SHD, core_k_NKD, core_v_NKD, out_SHD, lse_SH)
        ctx.rest = first_S, num_S, scale
        merged_SHD = out_SHD.clone()
        for tile in _tiles(q_SHD, core_k_NKD, core_v_NKD, lse_SH, *ctx.rest):
            p_KGRC, p_window_RH = tile.weigh()
            seen_RHD = _ungroup(p_KGRC @ tile.v_KCD[:, None])
            merged_SHD[tile.rows] = (p_window_RH[..., None] * out_SHD[tile.rows] + seen_RHD).to(merged_SHD.dtype)
        return merged_SHD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_SHD, core_k_NKD, core_v_NKD, out_SHD, lse_SH = ctx.saved_tensors
        (dmerged_SHD,) = grad_outputs
        dq, dout, dlse = torch.zeros_like(q_SHD), dmerged_SHD.clone(), torch.zeros_like(lse_SH)
        dk, dv = (torch.zeros(x.shape, dtype=lse_SH.dtype, device=x.device) for x in (core_k_NKD, core_v_NKD))
        for tile in _tiles(q_SHD, core_k_NKD, core_v_NKD, lse_SH, *ctx.rest):
            rows, cores = tile.rows, tile.cores
            p_KGRC, p_window_RH = tile.weigh()
            dmerged_RHD = dmerged_SHD[rows].to(lse_SH.dtype)
            d_KGRD = _group(dmerged_RHD, core_k_NKD.shape[1])
            dp_KGRC = d_KGRD @ tile.v_KCD[:, None].mT
            dp_window_RH = (dmerged_RHD * out_SHD[rows]).sum(-1)
            delta_RH = p_window_RH * dp_window_RH + _ungroup((p_KGRC * dp_KGRC).sum(-1, keepdim=True))[..., 0]
            ds_KGRC = p_KGRC * (dp_KGRC - _group(delta_RH[..., None], core_k_NKD.shape[1])) * tile.scale
            dq[rows] = _ungroup(ds_KGRC @ tile.k_KCD[:, None]).to(dq.dtype)
            dk[cores] += (ds_KGRC.mT @ tile.q_KGRD).sum(1).transpose(0, 1)
            dv[cores] += (p_KGRC.mT @ d_KGRD).sum(1).transpose(0, 1)
            dout[rows] = (p_window_RH[..., None] * dmerged_RHD).to(dout.dtype)
            dlse[rows] = p_window_RH * (dp_window_RH - delta_RH)
        return dq, dk.to(core_k_NKD.dtype), dv.to(core_v_NKD.dtype), dout, dlse, None, None, None


@dataclass(slots=True)
class _Tile:
    """Queries, and the cores that any of them sees."""

    rows: slice
    cores: slice
    q_KGRD: torch.Tensor
    k_KCD: torch.Tensor
    v_KCD: torch.Tensor
    lse_RH: torch.Tensor
    hidden_RC: torch.Tensor
    scale: float

    def weigh(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax over window and cores: of each core, and of the window as a whole."""
        scores_KGRC = (self.q_KGRD @ self.k_KCD[:, None].mT * self.scale).masked_fill(self.hidden_RC, float("-inf"))
        total_RH = torch.logaddexp(self.lse_RH, _ungroup(scores_KGRC.logsumexp(-1, keepdim=True))[..., 0])
        p_KGRC = torch.exp(scores_KGRC - _group(total_RH[..., None], self.k_KCD.shape[0]))
        return p_KGRC, torch.exp(self.lse_RH - total_RH)


def _tiles(
    q_SHD: torch.Tensor,
    core_k_NKD: torch.Tensor,
    core_v_NKD: torch.Tensor,
    lse_SH: torch.Tensor,
    first_S: torch.Tensor,
    num_S: torch.Tensor,
    scale: float,
) -> Iterator[_Tile]:
    """Those that see any core; products are in the dtype of the log-sum-exp."""
    num_heads, dtype = q_SHD.shape[1], lse_SH.dtype
    firsts, counts = first_S.tolist(), num_S.tolist()
    num_rows = max(1, min(TILE_ROWS, TILE_SCORES // (num_heads * max(1, len(core_k_NKD)))))
    for start in range(0, len(firsts), num_rows):
        stop = min(start + num_rows, len(firsts))
        seeing = [row for row in range(start, stop) if counts[row]]
        if not seeing:
            continue
        rows = slice(seeing[0], seeing[-1] + 1)
        cores = slice(firsts[seeing[0]], max(firsts[row] + counts[row] for row in seeing))
        index_C = torch.arange(cores.start, cores.stop, device=q_SHD.device)
        first, num = (x[rows, None].to(q_SHD.device) for x in (first_S, num_S))
        hidden_RC = (index_C < first) | (index_C >= first + num)
        k, v = (x[cores].to(dtype).transpose(0, 1) for x in (core_k_NKD, core_v_NKD))
        q_KGRD = _group(q_SHD[rows].to(dtype), core_k_NKD.shape[1])
        yield _Tile(rows, cores, q_KGRD, k, v, lse_SH[rows], hidden_RC, scale)


def _group(x_RHD: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[R, K * G, D]`` as ``[K, G, R, D]``."""
    return x_RHD.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _ungroup(x_KGRD: torch.Tensor) -> torch.Tensor:
    """``[K, G, R, D]`` as ``[R, K * G, D]``."""
    return x_KGRD.permute(2, 0, 1, 3).flatten(1, 2)
