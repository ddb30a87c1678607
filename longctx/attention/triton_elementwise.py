"""What lies between the products of a layer on a GPU, in Triton: norms, SiLU, rotation and storing, a kernel each.

In plain torch each of them is about ten kernels that read and write their rows again, and a decode step waits for
launches. Sums and angles are float32; a result is rounded once. Rows whose slot is negative are not stored.

Legend: T tokens, C columns (padded to a power of two), N heads of a program, H query heads, K KV heads, D head dim
(padded to a power of two).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from longctx.attention.backend import HeadNorm
from longctx.attention.batch import AttentionShape, PackedBatch
from longctx.attention.triton_decode import page_strides

HEADS = 8  # of a program
SILU_COLUMNS = 1024


def rms_norm_rows(x_TC: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``AttentionBackend.rms_norm`` of contiguous rows."""
    return _norm(x_TC, None, weight, eps)


def add_rms_norm_rows(x_TC: torch.Tensor, addend_TC: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``AttentionBackend.add_rms_norm`` of contiguous rows."""
    return _norm(x_TC, addend_TC, weight, eps)


def _norm(x_TC: torch.Tensor, addend_TC: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    assert x_TC.is_contiguous() and (addend_TC is None or addend_TC.is_contiguous())
    out_TC = torch.empty_like(x_TC)
    num_columns = x_TC.shape[-1]
    padded = triton.next_power_of_2(num_columns)
    kernel: Any = _norm_row
    if x_TC.numel():
        with torch.cuda.device_of(x_TC):
            kernel[(x_TC.numel() // num_columns,)](
                x_TC, x_TC if addend_TC is None else addend_TC, weight, out_TC, num_columns, eps,
                COLUMNS=padded, IS_SUM=addend_TC is not None, num_warps=max(1, min(16, padded // 512)),
            )  # fmt: skip
    return out_TC


def silu_mul_rows(gate_up_TC: torch.Tensor) -> torch.Tensor:
    """``AttentionBackend.silu_mul`` of contiguous rows."""
    assert gate_up_TC.is_contiguous()
    num_rows, size = gate_up_TC.shape[0], gate_up_TC.shape[1] // 2
    out_TC = gate_up_TC.new_empty((num_rows, size))
    kernel: Any = _silu_mul
    if out_TC.numel():
        with torch.cuda.device_of(gate_up_TC):
            kernel[(num_rows, triton.cdiv(size, SILU_COLUMNS))](
                gate_up_TC, out_TC, size, COLUMNS=SILU_COLUMNS, num_warps=4
            )
    return out_TC


def rotate_and_store(
    qkv_TC: torch.Tensor, norm: HeadNorm | None, shape: AttentionShape, batch: PackedBatch
) -> torch.Tensor:
    """``AttentionBackend.prepare`` into pages in ``nhd`` or ``hnd`` order; rotated queries ``[T, H, D]``."""
    assert batch.cos_TD is not None and batch.sin_TD is not None
    num_tokens, num_heads, head_dim = qkv_TC.shape[0], shape.num_heads, shape.head_dim
    qkv_TC = qkv_TC.contiguous()
    q_THD = qkv_TC.new_empty((num_tokens, num_heads, head_dim))
    k_pages, v_pages = batch.pool.views(shape.layer_idx)
    page, token, head = page_strides(k_pages, batch.pool.layout.order)
    weights = (batch.cos_TD, batch.cos_TD) if norm is None else (norm.q_weight, norm.k_weight)
    kernel: Any = _rotate_and_store
    if num_tokens:
        with torch.cuda.device_of(qkv_TC):
            kernel[(num_tokens, triton.cdiv(num_heads + 2 * shape.num_kv_heads, HEADS))](
                qkv_TC, *weights, batch.cos_TD, batch.sin_TD, batch.slots_T, q_THD, k_pages, v_pages,
                num_heads, shape.num_kv_heads, head_dim, batch.cos_TD.shape[1], batch.pool.layout.page_size,
                page, token, head, 0.0 if norm is None else norm.eps,
                HEADS=HEADS, DIM=triton.next_power_of_2(head_dim), HAS_NORM=norm is not None, num_warps=4,
            )  # fmt: skip
    return q_THD


@triton.jit
def _norm_row(
    x_ptr, addend_ptr, weight_ptr, out_ptr, num_columns, eps, COLUMNS: tl.constexpr, IS_SUM: tl.constexpr
):  # fmt: skip
    column_C = tl.arange(0, COLUMNS)
    is_there_C = column_C < num_columns
    at_C = tl.program_id(0).to(tl.int64) * num_columns + column_C
    x_C = tl.load(x_ptr + at_C, mask=is_there_C, other=0.0).to(tl.float32)
    if IS_SUM:
        x_C += tl.load(addend_ptr + at_C, mask=is_there_C, other=0.0).to(tl.float32)
        rounded_C = x_C.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at_C, rounded_C, mask=is_there_C)
        x_C = rounded_C.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x_C * x_C, 0) / num_columns + eps)
    weight_C = tl.load(weight_ptr + column_C, mask=is_there_C, other=0.0)
    tl.store(out_ptr + at_C, (x_C * factor * weight_C).to(out_ptr.dtype.element_ty), mask=is_there_C)


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, size, COLUMNS: tl.constexpr):
    row, column_C = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_there_C = column_C < size
    gate_C = tl.load(gate_up_ptr + row * 2 * size + column_C, mask=is_there_C, other=0.0).to(tl.float32)
    up_C = tl.load(gate_up_ptr + row * 2 * size + size + column_C, mask=is_there_C, other=0.0).to(tl.float32)
    out_C = gate_C / (1.0 + tl.exp(-gate_C)) * up_C
    tl.store(out_ptr + row * size + column_C, out_C.to(out_ptr.dtype.element_ty), mask=is_there_C)


@triton.jit
def _rotate_and_store(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    num_heads,
    num_kv_heads,
    head_dim,
    rotary_dim,
    page_size,
    page_stride,
    token_stride,
    head_stride,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    token, head_N = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dim_D, num_all = tl.arange(0, DIM), num_heads + 2 * num_kv_heads
    is_dim_D, is_turned_D = dim_D < head_dim, dim_D < rotary_dim
    is_q_N, is_v_N = head_N < num_heads, head_N >= num_heads + num_kv_heads
    half = rotary_dim // 2
    partner_D = tl.where(dim_D < half, dim_D + half, dim_D - half)  # what a dimension turns with
    row_N = qkv_ptr + (token * num_all + head_N) * head_dim
    is_there_ND = (head_N < num_all)[:, None] & is_dim_D[None, :]
    is_turned_ND = is_there_ND & is_turned_D[None, :] & (head_N < num_heads + num_kv_heads)[:, None]
    x_ND = tl.load(row_N[:, None] + dim_D[None, :], mask=is_there_ND, other=0.0).to(tl.float32)
    partner_ND = tl.load(row_N[:, None] + partner_D[None, :], mask=is_turned_ND, other=0.0).to(tl.float32)
    plain_ND = x_ND
    if HAS_NORM:
        factor_N1 = tl.rsqrt(tl.sum(x_ND * x_ND, 1) / head_dim + eps)[:, None]
        q_weight_D = tl.load(q_weight_ptr + dim_D, mask=is_dim_D, other=0.0)
        k_weight_D = tl.load(k_weight_ptr + dim_D, mask=is_dim_D, other=0.0)
        x_ND = x_ND * factor_N1 * tl.where(is_q_N[:, None], q_weight_D[None, :], k_weight_D[None, :])
        q_weight_D = tl.load(q_weight_ptr + partner_D, mask=is_turned_D, other=0.0)
        k_weight_D = tl.load(k_weight_ptr + partner_D, mask=is_turned_D, other=0.0)
        partner_ND = partner_ND * factor_N1 * tl.where(is_q_N[:, None], q_weight_D[None, :], k_weight_D[None, :])
    cos_D = tl.load(cos_ptr + token * rotary_dim + dim_D, mask=is_turned_D, other=1.0)
    sin_D = tl.load(sin_ptr + token * rotary_dim + dim_D, mask=is_turned_D, other=0.0)
    sin_D = tl.where(dim_D < half, -sin_D, sin_D)
    turned_ND = x_ND * cos_D[None, :] + partner_ND * sin_D[None, :]
    q_at_N = q_ptr + (token * num_heads + head_N) * head_dim
    rounded_ND = turned_ND.to(q_ptr.dtype.element_ty)
    tl.store(q_at_N[:, None] + dim_D[None, :], rounded_ND, mask=is_there_ND & is_q_N[:, None])
    slot = tl.load(slots_ptr + token)
    is_stored_ND = is_there_ND & (head_N < tl.where(slot >= 0, num_all, 0))[:, None]
    at = slot // page_size * page_stride + slot % page_size * token_stride
    k_at_N = k_ptr + at + (head_N - num_heads) * head_stride
    v_at_N = v_ptr + at + (head_N - num_heads - num_kv_heads) * head_stride
    is_k_N = (head_N >= num_heads) & (head_N < num_heads + num_kv_heads)
    kept_ND = turned_ND.to(k_ptr.dtype.element_ty)
    tl.store(k_at_N[:, None] + dim_D[None, :], kept_ND, mask=is_stored_ND & is_k_N[:, None])
    plain_ND = plain_ND.to(v_ptr.dtype.element_ty)
    tl.store(v_at_N[:, None] + dim_D[None, :], plain_ND, mask=is_stored_ND & is_v_N[:, None])
