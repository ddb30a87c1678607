"""torch's CPU flash kernel on one block: it returns the log-sum-exp and has a backward. bfloat16 is computed in
float32.

The kernel rounds bfloat16 outputs, here of every tile, and the merged error would be larger than one kernel's: partial
results stay float32 until the last merge. Query heads that share a KV head are the kernel's batch, with K and V
expanded without a copy.
"""

import torch

from parallel.delta import output_with
from parallel.tile_attention import Block, TileKernel, accumulator_dtype, clear_empty_rows_, make_block_mask

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuFlash(TileKernel):
    """Any head dim, float64, float32, bfloat16 and float16."""

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None if device.type == "cpu" else f"it runs on a CPU, not on {device.type}"

    def forward(
        self, q_BSHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, block: Block, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = accumulator_dtype(q_BSHD.dtype)
        mask = _make_mask(block, dtype)
        out_BSHD = torch.empty(q_BSHD.shape, dtype=dtype)
        lse_BSH = torch.empty(q_BSHD.shape[:3], dtype=dtype)
        for index in range(q_BSHD.shape[0]):
            q, k, v = _grouped(q_BSHD[index], k_BLKD[index], v_BLKD[index], dtype)
            out_GKSD, lse_GKS = _flash(q, k, v, 0.0, block.is_causal, attn_mask=mask, scale=scale)
            out_BSHD[index] = _ungrouped(out_GKSD)
            lse_BSH[index] = _ungrouped(lse_GKS[..., None])[..., 0]
        if mask is not None and block.stairs is not None:
            clear_empty_rows_(mask.isinf().all(1), out_BSHD, lse_BSH)
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
        dtype = accumulator_dtype(q_BSHD.dtype)
        mask = _make_mask(block, dtype)
        dq = torch.empty(q_BSHD.shape, dtype=dtype)
        dk, dv = torch.empty(k_BLKD.shape, dtype=dtype), torch.empty(v_BLKD.shape, dtype=dtype)
        for index in range(q_BSHD.shape[0]):
            q, k, v = _grouped(q_BSHD[index], k_BLKD[index], v_BLKD[index], dtype)
            dout = _group(dout_BSHD[index].to(dtype), k.shape[1])
            delta_GKS1 = _group(delta_BSH[index].to(dtype)[..., None], k.shape[1])
            lse_GKS = _group(lse_BSH[index].to(dtype)[..., None], k.shape[1])[..., 0]
            out = output_with(delta_GKS1, dout)
            grads = _flash_backward(
                dout, q, k, v, out, lse_GKS.contiguous(), 0.0, block.is_causal, attn_mask=mask, scale=scale
            )
            dq[index] = _ungrouped(grads[0])
            dk[index] = grads[1].sum(0).transpose(0, 1)
            dv[index] = grads[2].sum(0).transpose(0, 1)
        return dq, dk, dv


def _grouped(
    q_SHD: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q_GKSD = _group(q_SHD.to(dtype), k_LKD.shape[1])
    k, v = (x.to(dtype).transpose(0, 1).expand(q_GKSD.shape[0], -1, -1, -1) for x in (k_LKD, v_LKD))
    return q_GKSD, k, v


def _group(x_SHD: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[S, K * G, D]`` as ``[G, K, S, D]``, a view."""
    return x_SHD.unflatten(1, (num_kv_heads, -1)).permute(2, 1, 0, 3)


def _ungrouped(x_GKSD: torch.Tensor) -> torch.Tensor:
    """``[G, K, S, D]`` as ``[S, K * G, D]``."""
    return x_GKSD.permute(2, 1, 0, 3).flatten(1, 2)


def _make_mask(block: Block, dtype: torch.dtype) -> torch.Tensor | None:
    hidden = make_block_mask(block, torch.device("cpu"))
    return None if hidden is None else torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
