"""Decode on a GPU, in Triton: each sequence's newest token attends to its pages.

A step reads every key and value once, so nothing but the memory's speed counts: query heads that share a KV head are
rows of one product, and a sequence's keys are split into parts that fill the GPU (Flash-Decoding, Dao et al., 2023).
How long a part is follows from the sequence's length when the kernel runs: a captured graph serves every length.

Legend: B sequences, H query heads, K KV heads, D head dim (padded to a power of two), G query heads of a KV head
(padded to 16), C keys of a tile, Z parts.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from longctx.attention.batch import AttentionShape
from memory.pages import PagePool

LOG2_E = tl.constexpr(1.4426950408889634)
COLUMNS = 64  # keys of a tile
NUM_PROGRAMS = 512  # that keep a GPU's memory busy
MAX_PARTS = 64
EVERYTHING = 2**31 - 1  # a window that is none


def attend_newest(
    q_BHD: torch.Tensor,
    shape: AttentionShape,
    pool: PagePool,
    tables_BP: torch.Tensor,
    kv_lens_B: torch.Tensor,
    *,
    max_kv_len: int,
) -> torch.Tensor:
    """``[B, H * D]`` in q's dtype; pages in ``nhd`` or ``hnd`` order.

    Args:
        q_BHD: rotated queries of the last token of each sequence, whose keys are stored.
        shape: of the layer.
        pool: of the pages.
        tables_BP: int32, pages in sequence order.
        kv_lens_B: int32, keys of each sequence, at least one.
        max_kv_len: none is longer; a captured call serves all up to it.
    """
    num_rows, num_heads, head_dim = q_BHD.shape
    num_kv_heads = shape.num_kv_heads
    dim, group = max(16, triton.next_power_of_2(head_dim)), num_heads // num_kv_heads
    most = max(1, min(MAX_PARTS, triton.cdiv(max_kv_len, 2 * COLUMNS), NUM_PROGRAMS // (num_rows * num_kv_heads)))
    num_parts = triton.next_power_of_2(most)
    q_BHD = q_BHD.contiguous()
    out_BHD = torch.empty_like(q_BHD)
    if not num_rows:
        return out_BHD.flatten(1)
    out_ZBHD = out_BHD.new_empty((num_parts, num_rows, num_heads, head_dim), dtype=torch.float32)
    lse_ZBH = out_ZBHD.new_empty(out_ZBHD.shape[:3])
    k_pages, v_pages = pool.views(shape.layer_idx)
    page, token, head = page_strides(k_pages, pool.layout.order)
    is_wide, window = dim > 128 or k_pages.element_size() == 4, shape.window or EVERYTHING
    attend: Any = _attend_part
    merge: Any = _merge_parts
    with torch.cuda.device_of(q_BHD):
        attend[(num_rows, num_kv_heads, num_parts)](
            q_BHD, k_pages, v_pages, tables_BP, kv_lens_B, out_ZBHD, lse_ZBH,
            num_heads, group, head_dim, tables_BP.stride(0), page, token, head, window, shape.scale,
            GROUP=max(16, triton.next_power_of_2(group)), PAGE_SIZE=pool.layout.page_size, COLUMNS=COLUMNS, DIM=dim,
            PARTS=num_parts, PRECISION="ieee" if k_pages.element_size() == 4 else "tf32", num_warps=4,
            num_stages=2 if is_wide else 3,
        )  # fmt: skip
        merge[(num_rows, num_heads)](
            out_ZBHD, lse_ZBH, kv_lens_B, out_BHD, num_rows, num_heads, head_dim, window,
            COLUMNS=COLUMNS, DIM=dim, PARTS=num_parts, num_warps=4,
        )  # fmt: skip
    return out_BHD.flatten(1)


def page_strides(pages: torch.Tensor, order: str) -> tuple[int, int, int]:
    """Of a page, a token and a head, in elements."""
    assert order in ("nhd", "hnd"), order
    page, first, second, _ = pages.stride()
    return (page, first, second) if order == "nhd" else (page, second, first)


@triton.jit
def _part_keys(num_keys, window, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """The first key that the newest token sees, and how many keys a part has: whole tiles."""
    low = tl.maximum(num_keys - window, 0)
    return low, tl.cdiv(tl.cdiv(num_keys - low, PARTS), COLUMNS) * COLUMNS


@triton.jit
def _attend_part(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    kv_lens_ptr,
    out_ptr,
    lse_ptr,
    num_heads,
    group,
    head_dim,
    table_stride,
    page_stride,
    token_stride,
    head_stride,
    window,
    scale,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_keys = tl.load(kv_lens_ptr + row)
    low, part_keys = _part_keys(num_keys, window, COLUMNS, PARTS)
    begin = low + part * part_keys
    end = tl.minimum(begin + part_keys, num_keys)
    if begin >= end:
        return
    member_G, dim_D, column_C = tl.arange(0, GROUP), tl.arange(0, DIM), tl.arange(0, COLUMNS)
    is_dim_D, is_member_G = dim_D < head_dim, member_G < group
    at_G = row * num_heads + kv_head * group + member_G
    is_there_GD = is_member_G[:, None] & is_dim_D[None, :]
    q_GD = tl.load(q_ptr + at_G[:, None] * head_dim + dim_D[None, :], mask=is_there_GD, other=0.0)
    q_GD = q_GD.to(k_ptr.dtype.element_ty)
    factor = scale * LOG2_E
    largest_G = tl.full([GROUP], float("-inf"), tl.float32)
    total_G = tl.zeros([GROUP], tl.float32)
    out_GD = tl.zeros([GROUP, DIM], tl.float32)
    for key in range(begin, end, COLUMNS):
        key_C = key + column_C
        is_key_C = key_C < end
        page_C = tl.load(tables_ptr + row * table_stride + key_C // PAGE_SIZE, mask=is_key_C, other=0).to(tl.int64)
        at_C = page_C * page_stride + (key_C % PAGE_SIZE) * token_stride + kv_head * head_stride
        is_there_CD = is_key_C[:, None] & is_dim_D[None, :]
        k_CD = tl.load(k_ptr + at_C[:, None] + dim_D[None, :], mask=is_there_CD, other=0.0)
        v_CD = tl.load(v_ptr + at_C[:, None] + dim_D[None, :], mask=is_there_CD, other=0.0)
        scores_GC = tl.dot(q_GD, tl.trans(k_CD), input_precision=PRECISION) * factor
        scores_GC = tl.where(is_key_C[None, :], scores_GC, float("-inf"))
        new_G = tl.maximum(largest_G, tl.max(scores_GC, 1))  # every tile has a key
        weights_GC = tl.exp2(scores_GC - new_G[:, None])
        kept_G = tl.exp2(largest_G - new_G)
        out_GD = out_GD * kept_G[:, None] + tl.dot(weights_GC.to(v_CD.dtype), v_CD, input_precision=PRECISION)
        total_G = total_G * kept_G + tl.sum(weights_GC, 1)
        largest_G = new_G
    target_G = part.to(tl.int64) * tl.num_programs(0) * num_heads + at_G
    tl.store(out_ptr + target_G[:, None] * head_dim + dim_D[None, :], out_GD / total_G[:, None], mask=is_there_GD)
    tl.store(lse_ptr + target_G, largest_G + tl.log2(total_G), mask=is_member_G)


@triton.jit
def _merge_parts(
    out_parts_ptr,
    lse_ptr,
    kv_lens_ptr,
    out_ptr,
    num_rows,
    num_heads,
    head_dim,
    window,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """By log-sum-exp in base 2; parts behind the last key were not written."""
    row, head = tl.program_id(0), tl.program_id(1)
    num_keys = tl.load(kv_lens_ptr + row)
    low, part_keys = _part_keys(num_keys, window, COLUMNS, PARTS)
    part_Z, dim_D = tl.arange(0, PARTS), tl.arange(0, DIM)
    is_part_Z = low + part_Z * part_keys < num_keys
    at_Z = part_Z.to(tl.int64) * num_rows * num_heads + row * num_heads + head
    lse_Z = tl.load(lse_ptr + at_Z, mask=is_part_Z, other=float("-inf"))
    is_there_ZD = is_part_Z[:, None] & (dim_D < head_dim)[None, :]
    out_ZD = tl.load(out_parts_ptr + at_Z[:, None] * head_dim + dim_D[None, :], mask=is_there_ZD, other=0.0)
    share_Z = tl.exp2(lse_Z - tl.max(lse_Z, 0))
    out_D = tl.sum(out_ZD * share_Z[:, None], 0) / tl.sum(share_Z, 0)
    at = (row * num_heads + head) * head_dim
    tl.store(out_ptr + at + dim_D, out_D.to(out_ptr.dtype.element_ty), mask=dim_D < head_dim)
