"""Merging partial attention in one pass over memory, in Triton: the only module that imports it.

The max-shifted form of Flash-Decoding's merge: what weighs nothing is never a difference of infinities. A program
takes a few rows (batch, token and head) whole. Tensors may be views of others: every stride is an argument.

Legend: B batch, S queries, H heads, D head dim; in the kernel R rows of a program.
"""

from typing import Any

import torch
import triton
import triton.language as tl

ELEMENTS = 4096  # of one program


def merge_with_triton_(
    out_BSHD: torch.Tensor, lse_BSH: torch.Tensor, partial_out_BSHD: torch.Tensor, partial_lse_BSH: torch.Tensor
) -> None:
    """``parallel.merge.merge_partial_`` on a GPU; rows that neither side has seen stay zero and minus infinity.

    Args:
        out_BSHD, lse_BSH: float32 (float64), changed in place.
        partial_out_BSHD: the same shape, any floating dtype; not read where ``partial_lse_BSH`` is minus infinity.
        partial_lse_BSH: the shape of ``lse_BSH``.
    """
    if out_BSHD.dim() == 3:
        out_BSHD, lse_BSH, partial_out_BSHD, partial_lse_BSH = (
            x[None] for x in (out_BSHD, lse_BSH, partial_out_BSHD, partial_lse_BSH)
        )
    batch_size, num_tokens, num_heads, head_dim = out_BSHD.shape
    num_rows = batch_size * num_tokens * num_heads
    if not num_rows:
        return
    padded_dim = triton.next_power_of_2(head_dim)
    num_rows_each = max(1, ELEMENTS // padded_dim)
    kernel: Any = _merge
    with torch.cuda.device_of(out_BSHD):  # Triton launches on the current device
        kernel[triton.cdiv(num_rows, num_rows_each),](
            out_BSHD,
            lse_BSH,
            partial_out_BSHD,
            partial_lse_BSH,
            num_rows,
            num_tokens,
            num_heads,
            head_dim,
            *out_BSHD.stride(),
            *lse_BSH.stride(),
            *partial_out_BSHD.stride(),
            *partial_lse_BSH.stride(),
            ROWS=num_rows_each,
            DIM=padded_dim,
        )


@triton.jit
def _merge(
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    num_rows,
    num_tokens,
    num_heads,
    head_dim,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    out_stride_d,
    lse_stride_b,
    lse_stride_s,
    lse_stride_h,
    partial_out_stride_b,
    partial_out_stride_s,
    partial_out_stride_h,
    partial_out_stride_d,
    partial_lse_stride_b,
    partial_lse_stride_s,
    partial_lse_stride_h,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # a million tokens pass 2^31 elements
    dim_D = tl.arange(0, DIM)
    is_row_R = row_R < num_rows
    is_element_RD = is_row_R[:, None] & (dim_D < head_dim)[None, :]
    head_R, token_R = row_R % num_heads, row_R // num_heads % num_tokens
    batch_R = row_R // num_heads // num_tokens

    lse_at_R = lse_ptr + batch_R * lse_stride_b + token_R * lse_stride_s + head_R * lse_stride_h
    partial_lse_at_R = partial_lse_ptr + (
        batch_R * partial_lse_stride_b + token_R * partial_lse_stride_s + head_R * partial_lse_stride_h
    )
    lse_R = tl.load(lse_at_R, mask=is_row_R, other=float("-inf"))
    partial_lse_R = tl.load(partial_lse_at_R, mask=is_row_R, other=float("-inf")).to(lse_R.dtype)
    largest_R = tl.maximum(lse_R, partial_lse_R)
    is_seen_R = largest_R > float("-inf")
    shift_R = tl.where(is_seen_R, largest_R, 0.0)
    weight_R, partial_weight_R = tl.exp(lse_R - shift_R), tl.exp(partial_lse_R - shift_R)
    total_R = tl.where(is_seen_R, weight_R + partial_weight_R, 1.0)

    out_at_RD = out_ptr + (
        (batch_R * out_stride_b + token_R * out_stride_s + head_R * out_stride_h)[:, None]
        + dim_D[None, :] * out_stride_d
    )
    partial_out_at_RD = partial_out_ptr + (
        (batch_R * partial_out_stride_b + token_R * partial_out_stride_s + head_R * partial_out_stride_h)[:, None]
        + dim_D[None, :] * partial_out_stride_d
    )
    is_new_RD = is_element_RD & (partial_weight_R > 0)[:, None]
    out_RD = tl.load(out_at_RD, mask=is_element_RD, other=0.0)
    partial_out_RD = tl.load(partial_out_at_RD, mask=is_new_RD, other=0.0).to(out_RD.dtype)
    merged_RD = out_RD * (weight_R / total_R)[:, None] + partial_out_RD * (partial_weight_R / total_R)[:, None]
    tl.store(out_at_RD, merged_RD, mask=is_element_RD)
    tl.debug_barrier()  # every warp has read the rows' log-sum-exps for itself; one of them writes the new ones
    tl.store(lse_at_R, tl.where(is_seen_R, shift_R + tl.log(total_R), float("-inf")), mask=is_row_R)
