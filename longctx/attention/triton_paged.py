"""Attention of query rows to ranges of paged keys on a GPU, in Triton, with log-sum-exp.

What landmark and CCA attention decode and prefill with: own blocks, cores, windows, and gathered blocks, where every
row sees the whole of one page and KV head. A program has rows of one segment and KV head, query heads folded in; a long
range of few rows is split, and the parts are merged by log-sum-exp (Flash-Decoding).

Legend: S rows, B segments, R rows of a program times the query heads of a KV head, C keys of a tile, H query heads, K
KV heads, D head dim (padded to a power of two), Z splits.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from longctx.attention.batch import AttentionShape, HeadPages, KeyRanges
from longctx.attention.triton_decode import page_strides
from memory.pages import PagePool

LOG2_E = tl.constexpr(1.4426950408889634)
SPLIT_KEYS = 2048  # a range is split into parts of at least so many keys
MIN_PROGRAMS = 256  # that keep a GPU busy: with as many, nothing is split


def attend_ranges_with_triton(
    q_SHD: torch.Tensor, shape: AttentionShape, ranges: KeyRanges, pool: PagePool, *, first_kv_head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``AttentionBackend.attend_ranges`` promises, over pages in ``nhd`` or ``hnd`` order."""
    num_segments, num_pages = ranges.block_tables_BP.shape
    heads_B = torch.full((num_segments,), first_kv_head, dtype=torch.int64, device=q_SHD.device)
    return _attend(
        q_SHD, shape, pool, ranges.cu_seqlens_B1, ranges.block_tables_BP, heads_B, ranges.first_S, ranges.last_S,
        num_keys=num_pages * pool.layout.page_size,
    )  # fmt: skip


def attend_pages_with_triton(
    q_SD: torch.Tensor, shape: AttentionShape, seen: HeadPages, pool: PagePool
) -> torch.Tensor:
    """What ``AttentionBackend.attend_pages`` promises."""
    size = pool.layout.page_size
    first_S = torch.zeros(len(q_SD), dtype=torch.int32, device=q_SD.device)
    out_SHD, _ = _attend(
        q_SD[:, None], shape, pool, seen.cu_seqlens_B1, seen.pages_B[:, None].int(), seen.kv_heads_B, first_S,
        first_S + size, num_kv_heads=1, num_keys=size,
    )  # fmt: skip
    return out_SHD[:, 0]


def _attend(
    q_SHD: torch.Tensor,
    shape: AttentionShape,
    pool: PagePool,
    cu_seqlens_B1: torch.Tensor,
    tables_BP: torch.Tensor,
    heads_B: torch.Tensor,
    first_S: torch.Tensor,
    last_S: torch.Tensor,
    *,
    num_keys: int,
    num_kv_heads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows to keys ``first_S`` to ``last_S`` of their segment.

    Args:
        heads_B: the KV head that a segment's first query heads read.
        num_keys: of a segment at most.
        num_kv_heads: that the query heads read; None: the layer's.
    """
    num_rows, num_heads, head_dim = q_SHD.shape
    num_kv_heads = num_kv_heads or shape.num_kv_heads
    group, num_segments = num_heads // num_kv_heads, len(heads_B)
    dim, padded_group = max(16, triton.next_power_of_2(head_dim)), triton.next_power_of_2(group)
    most = 64 if dim <= 128 else 32
    tokens = max(1, min(most, triton.next_power_of_2(max(1, num_rows // max(1, num_segments)))) // padded_group)
    tokens = max(tokens, 16 // padded_group, 1)
    num_tiles = num_rows // tokens + num_segments  # at most: a segment's last one may be partly filled
    num_splits = min(-(-num_keys // SPLIT_KEYS), max(1, MIN_PROGRAMS // max(1, num_tiles * num_kv_heads)))
    out_ZSHD = q_SHD.new_zeros((num_splits, num_rows, num_heads, head_dim), dtype=torch.float32)
    lse_ZSH = out_ZSHD.new_full(out_ZSHD.shape[:3], float("-inf"))
    if num_rows and num_segments:
        k_pages, v_pages = pool.views(shape.layer_idx)
        page, token, head = page_strides(k_pages, pool.layout.order)
        q_SHD, tables_BP = q_SHD.contiguous(), tables_BP.contiguous()
        kernel: Any = _attend_tile
        with torch.cuda.device_of(q_SHD):
            kernel[(num_tiles, num_kv_heads, num_splits)](
                q_SHD, k_pages, v_pages, cu_seqlens_B1, tables_BP, heads_B, first_S, last_S, out_ZSHD, lse_ZSH,
                num_segments, num_rows, num_heads, group, head_dim, tables_BP.shape[1], page,
                token, head, -(-num_keys // num_splits), shape.scale,
                TOKENS=tokens, GROUP=padded_group, PAGE_SIZE=pool.layout.page_size, COLUMNS=32 if dim > 128 else 64,
                DIM=dim, PRECISION="ieee" if k_pages.element_size() == 4 else "tf32", num_warps=4, num_stages=2,
            )  # fmt: skip
    if num_splits == 1:
        return out_ZSHD[0], lse_ZSH[0]
    lse_SH = lse_ZSH.logsumexp(0)
    shares_ZSH = torch.exp(lse_ZSH - lse_SH.masked_fill(lse_SH == float("-inf"), 0.0))
    return (out_ZSHD * shares_ZSH[..., None]).sum(0), lse_SH


@triton.jit
def _find_segment(cu_seqlens_ptr, num_segments, tile, TOKENS: tl.constexpr):
    """The segment that a tile is of: that of segment b begins at tile ``cu_seqlens[b] // TOKENS + b``."""
    low, high = 0, num_segments
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) // TOKENS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _add_keys(
    q_RD, k_ptr, v_ptr, table_ptr, key, begin, end, low_R, high_R, page_stride, token_stride, head_offset, head_dim,
    factor, largest_R, total_R, out_RD,
    IS_MASKED: tl.constexpr, PAGE_SIZE: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over a tile of keys; not masked: rows see all of them."""
    key_C, dim_D = key + tl.arange(0, COLUMNS), tl.arange(0, DIM)
    is_key_C = (key_C >= begin) & (key_C < end)
    if PAGE_SIZE % COLUMNS == 0:  # a tile's keys are of one page
        page_C = tl.load(table_ptr + key // PAGE_SIZE).to(tl.int64)
    elif IS_MASKED:
        page_C = tl.load(table_ptr + key_C // PAGE_SIZE, mask=is_key_C, other=0).to(tl.int64)
    else:
        page_C = tl.load(table_ptr + key_C // PAGE_SIZE).to(tl.int64)
    at_C = page_C * page_stride + (key_C % PAGE_SIZE) * token_stride + head_offset
    is_there_CD = (dim_D < head_dim)[None, :]
    if IS_MASKED:
        is_there_CD = is_key_C[:, None] & is_there_CD
    k_CD = tl.load(k_ptr + at_C[:, None] + dim_D[None, :], mask=is_there_CD, other=0.0)
    v_CD = tl.load(v_ptr + at_C[:, None] + dim_D[None, :], mask=is_there_CD, other=0.0)
    scores_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision=PRECISION) * factor
    if IS_MASKED:
        is_seen_RC = (key_C[None, :] >= low_R[:, None]) & (key_C[None, :] < high_R[:, None]) & is_key_C[None, :]
        scores_RC = tl.where(is_seen_RC, scores_RC, float("-inf"))
    new_R = tl.maximum(largest_R, tl.max(scores_RC, 1))
    shift_R = tl.where(new_R == float("-inf"), 0.0, new_R)
    weights_RC = tl.exp2(scores_RC - shift_R[:, None])
    kept_R = tl.exp2(largest_R - shift_R)
    out_RD = out_RD * kept_R[:, None] + tl.dot(weights_RC.to(v_CD.dtype), v_CD, input_precision=PRECISION)
    return new_R, total_R * kept_R + tl.sum(weights_RC, 1), out_RD


@triton.jit
def _attend_tile(
    q_ptr,
    k_ptr,
    v_ptr,
    cu_seqlens_ptr,
    tables_ptr,
    heads_ptr,
    first_ptr,
    last_ptr,
    out_ptr,
    lse_ptr,
    num_segments,
    num_rows,
    num_heads,
    group,
    head_dim,
    table_stride,
    page_stride,
    token_stride,
    head_stride,
    split_keys,
    scale,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, own_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    segment = _find_segment(cu_seqlens_ptr, num_segments, tile, TOKENS)
    start, stop = tl.load(cu_seqlens_ptr + segment), tl.load(cu_seqlens_ptr + segment + 1)
    first_row = start + (tile - (start // TOKENS + segment)) * TOKENS
    if first_row >= stop:
        return
    index_R = tl.arange(0, TOKENS * GROUP)
    row_R, member_R = first_row + index_R // GROUP, index_R % GROUP
    is_row_R = (row_R < stop) & (member_R < group)
    low_R = tl.load(first_ptr + row_R, mask=is_row_R, other=2147483647)
    high_R = tl.load(last_ptr + row_R, mask=is_row_R, other=0)
    is_row_R = is_row_R & (low_R < high_R)
    low_R = tl.where(is_row_R, low_R, 2147483647)
    high_R = tl.where(is_row_R, high_R, 0)
    begin = tl.maximum(tl.min(low_R, 0), split * split_keys)
    end = tl.minimum(tl.max(high_R, 0), (split + 1) * split_keys)
    if begin >= end:
        return
    dim_D = tl.arange(0, DIM)
    at_R = row_R.to(tl.int64) * num_heads + own_head * group + member_R
    is_there_RD = is_row_R[:, None] & (dim_D < head_dim)[None, :]
    q_RD = tl.load(q_ptr + at_R[:, None] * head_dim + dim_D[None, :], mask=is_there_RD, other=0.0)
    q_RD = q_RD.to(k_ptr.dtype.element_ty)
    kv_head = tl.load(heads_ptr + segment) + own_head
    factor = scale * LOG2_E
    largest_R = tl.full([TOKENS * GROUP], float("-inf"), tl.float32)
    total_R = tl.zeros([TOKENS * GROUP], tl.float32)
    out_RD = tl.zeros([TOKENS * GROUP, DIM], tl.float32)
    table_ptr = tables_ptr + segment * table_stride
    first_all = tl.max(tl.where(is_row_R, low_R, 0), 0)  # between these two every row that is here sees every key
    last_all = tl.min(tl.where(is_row_R, high_R, 2147483647), 0)
    aligned = begin // COLUMNS * COLUMNS
    whole = tl.minimum(tl.cdiv(tl.maximum(first_all, begin), COLUMNS) * COLUMNS, end)
    last_whole = tl.maximum(tl.minimum(last_all, end) // COLUMNS * COLUMNS, whole)
    for key in range(aligned, whole, COLUMNS):
        largest_R, total_R, out_RD = _add_keys(
            q_RD, k_ptr, v_ptr, table_ptr, key, begin, end, low_R, high_R, page_stride, token_stride,
            kv_head * head_stride, head_dim, factor, largest_R, total_R, out_RD, True, PAGE_SIZE, COLUMNS, DIM,
            PRECISION,
        )  # fmt: skip
    for key in range(whole, last_whole, COLUMNS):
        largest_R, total_R, out_RD = _add_keys(
            q_RD, k_ptr, v_ptr, table_ptr, key, begin, end, low_R, high_R, page_stride, token_stride,
            kv_head * head_stride, head_dim, factor, largest_R, total_R, out_RD, False, PAGE_SIZE, COLUMNS, DIM,
            PRECISION,
        )  # fmt: skip
    for key in range(last_whole, end, COLUMNS):
        largest_R, total_R, out_RD = _add_keys(
            q_RD, k_ptr, v_ptr, table_ptr, key, begin, end, low_R, high_R, page_stride, token_stride,
            kv_head * head_stride, head_dim, factor, largest_R, total_R, out_RD, True, PAGE_SIZE, COLUMNS, DIM,
            PRECISION,
        )  # fmt: skip
    has_seen_R = total_R > 0
    divisor_R = tl.where(has_seen_R, total_R, 1.0)
    lse_R = tl.where(has_seen_R, (largest_R + tl.log2(divisor_R)) / LOG2_E, float("-inf"))
    target_R = split.to(tl.int64) * num_rows * num_heads + at_R
    tl.store(out_ptr + target_R[:, None] * head_dim + dim_D[None, :], out_RD / divisor_R[:, None], mask=is_there_RD)
    tl.store(lse_ptr + target_R, lse_R, mask=is_row_R)
