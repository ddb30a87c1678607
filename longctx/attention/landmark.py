"""Landmark attention as it is trained: a softmax over landmarks that gates a softmax inside each block.

Mohtashami and Jaggi, 2023 (arXiv 2305.16300), section 3.1. A block is normal tokens and one landmark token behind them.
A query attends, in one softmax, to the normal tokens of its own block up to itself and to the landmarks of earlier
blocks; a landmark's weight is shared out among its block's normal tokens by a softmax of their own. Landmarks carry no
value, and inside its own block a landmark is seen by nobody.

With the log-sum-exp of a block's scores, that is one softmax over changed scores: s_ij - lse_im + l_im for token j of
an earlier block m with landmark score l_im.

Legend: S tokens, H query heads, K KV heads, D head dim.
"""

from collections.abc import Sequence
from typing import Any

import torch

from longctx.attention.arguments import check_tensors, document_bounds
from longctx.attention.landmark_blocks import Blocks, find_blocks
from longctx.attention.landmark_products import LandmarkProducts


def landmark_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_landmark: torch.Tensor,
    scale: float | None = None,
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal landmark attention over whole sequences, differentiable in q, k and v.

    Args:
        q: ``[batch, seq, num_heads, head_dim]``, rotated already.
        k, v: ``[batch, seq, num_kv_heads, head_dim]``; num_heads is a multiple of num_kv_heads.
        is_landmark: ``[batch, seq]`` bool: the last token of each block. Tokens behind the last are a block without.
        scale: of the scores; None is ``head_dim ** -0.5``.
        cu_seqlens: ``[num_documents + 1]`` boundaries of packed documents, for batch 1; nothing is seen across them,
            and blocks end at them.

    Returns:
        ``[batch, seq, num_heads, head_dim]`` in q's dtype. A landmark's own row is a query like any other.

    Raises:
        ValueError: for shapes, dtypes or boundaries that do not go together, or a block without a normal token.
    """
    check_tensors(q, k, v)
    if is_landmark.shape != q.shape[:2] or is_landmark.dtype != torch.bool:
        raise ValueError(
            f"is_landmark of shape {tuple(is_landmark.shape)} and dtype {is_landmark.dtype} is not allowed: "
            f"bool {tuple(q.shape[:2])}"
        )
    if not q.numel():
        return torch.empty_like(q)
    bounds = document_bounds(cu_seqlens, q)
    blocks = [find_blocks(row, bounds) for row in is_landmark.cpu()]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    attend = choose_landmark(q)
    return torch.cat(
        [attend(q[row : row + 1], k[row : row + 1], v[row : row + 1], blocks[row], scale) for row in range(len(q))]
    )


def choose_landmark(q: torch.Tensor) -> Any:
    """What attends like ``attend_with_torch``: Triton on a GPU that it computes for, else torch."""
    if q.device.type == "cuda" and q.dtype != torch.float64:
        from longctx.attention.triton_landmark import attend_with_triton

        return attend_with_triton
    return attend_with_torch


def attend_with_torch(
    q_1SHD: torch.Tensor, k_1SKD: torch.Tensor, v_1SKD: torch.Tensor, blocks: Blocks, scale: float
) -> torch.Tensor:
    """One sequence anywhere, in float32 (float64 for float64)."""
    return _TorchLandmark.apply(q_1SHD[0], k_1SKD[0], v_1SKD[0], blocks, scale)[None]


class _TorchLandmark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_SHD: Any, k_SKD: Any, v_SKD: Any, blocks: Blocks, scale: float) -> torch.Tensor:
        work = LandmarkProducts(q_SHD, k_SKD, v_SKD, blocks, scale)
        out_SHD, lse_KGS = work.forward()
        ctx.save_for_backward(q_SHD, k_SKD, v_SKD, out_SHD, lse_KGS)
        ctx.rest = blocks, scale
        return out_SHD.to(q_SHD.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (dout_SHD,) = gradients
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = LandmarkProducts(q, k, v, *ctx.rest).backward(dout_SHD, out, lse)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None
