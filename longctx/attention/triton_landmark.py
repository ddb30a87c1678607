"""Landmark attention on a GPU, in Triton: forward, and a backward that is parallel over key blocks.

The formulas are those of ``longctx/attention/landmark.py``. Keys and values lie in padded blocks, a power of two of
slots each with the landmark in the last, so a tile of keys is whole blocks, several where they are short, and a block's
own softmax never leaves its tile. dQ and (dK, dV) are two kernels over the same tiles: each owns what it writes, so
nothing is added up in global memory.

Legend: R queries of a program, C = M x P keys of a tile, M blocks, P slots of a block, D head dim (padded to a power of
two); S tokens, H query heads, K KV heads.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from longctx.attention.landmark_blocks import Blocks
from longctx.attention.triton_landmark_tiles import differentiate_tile, own_scores, score_tile, spread
from longctx.attention.triton_rows import count_stages, load_rows, store_rows

LOG2_E = tl.constexpr(1.4426950408889634)


def attend_with_triton(
    q_1SHD: torch.Tensor, k_1SKD: torch.Tensor, v_1SKD: torch.Tensor, blocks: Blocks, scale: float
) -> torch.Tensor:
    """``longctx.attention.landmark.attend_with_torch`` on a GPU; products in the tensors' dtype, sums in float32."""
    blocks = blocks.pad(max(16, triton.next_power_of_2(blocks.size)))
    rows_N = blocks.rows_MP.flatten().to(q_1SHD.device)
    k_NKD, v_NKD = k_1SKD[0].index_select(0, rows_N), v_1SKD[0].index_select(0, rows_N)
    return _TritonLandmark.apply(q_1SHD[0], k_NKD, v_NKD, _Tables(blocks, q_1SHD.device), scale)[None]


class _Tables:
    """What the kernels know of the blocks; int32 on the device."""

    def __init__(self, blocks: Blocks, device: torch.device) -> None:
        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, torch.int32)

        self.size, self.num_blocks = blocks.size, len(blocks.lengths_M)
        self.block_S, self.first_S, self.seen_S = move(blocks.block_S), move(blocks.first_S), move(blocks.seen_S)
        self.lengths_M = move(blocks.lengths_M)
        num_tokens = len(blocks.block_S)
        is_begin = torch.ones(self.num_blocks, dtype=torch.bool)
        is_begin[1:] = blocks.first_S[blocks.starts_M][1:] != blocks.first_S[blocks.starts_M][:-1]
        begins = torch.cat([blocks.starts_M[is_begin], torch.tensor([num_tokens])])
        document = is_begin.cumsum(0) - 1
        self.starts_M1 = move(torch.cat([blocks.starts_M, torch.tensor([num_tokens])]))
        self.ends_M = move(begins[document + 1])  # of a block's document, in tokens


class _TritonLandmark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_SHD: Any, k_NKD: Any, v_NKD: Any, tables: _Tables, scale: float) -> torch.Tensor:
        q, k, v = (x.contiguous() for x in (q_SHD, k_NKD, v_NKD))
        out_SHD = torch.empty_like(q)
        lse_HS = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        launch = _Launch(q, k, tables, scale)
        kernel: Any = _forward
        with torch.cuda.device_of(q):
            kernel[launch.query_grid](q, k, v, out_SHD, lse_HS, *launch.tables, *launch.sizes, **launch.forward)
        ctx.save_for_backward(q, k, v, out_SHD, lse_HS)
        ctx.launch = launch
        return out_SHD

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        q, k, v, out, lse_HS = ctx.saved_tensors
        dout, launch = gradients[0].contiguous(), ctx.launch
        delta_HS = (dout.float() * out.float()).sum(-1).t().contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        queries: Any = _backward_queries
        keys: Any = _backward_keys
        given = q, k, v, dout, lse_HS, delta_HS
        with torch.cuda.device_of(q):
            queries[launch.query_grid](*given, dq, *launch.tables, *launch.sizes, **launch.backward_queries)
            keys[launch.key_grid](*given, dk, dv, *launch.tables, *launch.sizes, **launch.backward_keys)
        return dq, dk, dv, None, None


class _Launch:
    """Grids and constants of one call."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, tables: _Tables, scale: float) -> None:
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads, padded_dim = k.shape[1], max(16, triton.next_power_of_2(head_dim))
        size = tables.size
        is_wide = padded_dim > 128 or q.element_size() == 4
        num_columns = max(size, 32 if is_wide else 64)
        self.tables = tables.block_S, tables.first_S, tables.seen_S, tables.lengths_M, tables.starts_M1, tables.ends_M
        self.sizes = num_tokens, tables.num_blocks, num_heads, num_heads // num_kv_heads, head_dim, scale
        precision = "ieee" if q.element_size() == 4 else "tf32"  # of float32 only
        common: dict[str, Any] = {
            "SLOTS": size,
            "BLOCKS": num_columns // size,
            "DIM": padded_dim,
            "PRECISION": precision,
        }
        warps, stages = (4, 2) if is_wide else (8, count_stages(q.device))
        self.forward = common | {"ROWS": 64 if is_wide else 128, "num_warps": warps, "num_stages": stages}
        self.backward_queries = common | {"ROWS": 32 if is_wide else 64, "num_warps": 4, "num_stages": 2}
        self.backward_keys = common | {"ROWS": 32 if is_wide else 64, "num_warps": 4, "num_stages": 2}
        self.query_grid = lambda meta: (triton.cdiv(num_tokens, meta["ROWS"]), num_heads, 1)
        self.key_grid = lambda meta: (triton.cdiv(tables.num_blocks, meta["BLOCKS"]), num_kv_heads, 1)


@triton.jit
def _add_tile(
    q_RD, k_ptr, v_ptr, length_ptr, begin, num_blocks, kv_head, num_kv_heads, head_dim, block_R, first_R, seen_R,
    factor, largest_R, total_R, out_RD, HAS_OWN: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over a tile of blocks."""
    dim_D, key_C = tl.arange(0, DIM), begin * SLOTS + tl.arange(0, BLOCKS * SLOTS)
    k_CD = load_rows(k_ptr, tl.program_id(2), key_C, num_blocks * SLOTS, kv_head, num_kv_heads, dim_D, head_dim)
    scores_RC, landmark_RM, inner_RC, sum_RM = score_tile(
        q_RD, k_CD, length_ptr, begin, num_blocks, factor, ROWS, SLOTS, BLOCKS, PRECISION
    )
    at_M = begin + tl.arange(0, BLOCKS)
    is_earlier_RM = (at_M[None, :] < block_R[:, None]) & (at_M[None, :] >= first_R[:, None])
    new_R = tl.maximum(largest_R, tl.max(tl.where(is_earlier_RM, landmark_RM, float("-inf")), 1))
    own_RC = own_scores(scores_RC, begin, block_R, seen_R, SLOTS, BLOCKS)  # compiled away where it is not used
    if HAS_OWN:
        new_R = tl.maximum(new_R, tl.max(own_RC, 1))
    shift_R = tl.where(new_R == float("-inf"), 0.0, new_R)
    gate_RM = tl.where(is_earlier_RM, tl.exp2(landmark_RM - shift_R[:, None]), 0.0)
    weights_RC = inner_RC * spread(gate_RM / sum_RM, ROWS, SLOTS, BLOCKS)
    kept_R = tl.exp2(largest_R - shift_R)
    total_R = total_R * kept_R + tl.sum(gate_RM, 1)
    if HAS_OWN:
        own_RC = tl.exp2(own_RC - shift_R[:, None])
        weights_RC += own_RC
        total_R += tl.sum(own_RC, 1)
    v_CD = load_rows(v_ptr, tl.program_id(2), key_C, num_blocks * SLOTS, kv_head, num_kv_heads, dim_D, head_dim)
    out_RD = out_RD * kept_R[:, None] + tl.dot(weights_RC.to(v_CD.dtype), v_CD, input_precision=PRECISION)
    return new_R, total_R, out_RD


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    block_ptr,
    first_ptr,
    seen_ptr,
    length_ptr,
    start_ptr,
    end_ptr,
    num_tokens,
    num_blocks,
    num_heads,
    group_size,
    head_dim: tl.constexpr,
    scale,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # late queries see most: they are begun first
    row_R, dim_D = row + tl.arange(0, ROWS), tl.arange(0, DIM)
    head = tl.program_id(1)
    kv_head, num_kv_heads = head // group_size, num_heads // group_size
    is_row_R = row_R < num_tokens
    block_R = tl.load(block_ptr + row_R, mask=is_row_R, other=-1)
    first_R = tl.load(first_ptr + row_R, mask=is_row_R, other=num_blocks)
    seen_R = tl.load(seen_ptr + row_R, mask=is_row_R, other=0)
    q_RD = load_rows(q_ptr, tl.program_id(2), row_R, num_tokens, head, num_heads, dim_D, head_dim)
    factor = scale * LOG2_E
    largest_R = tl.full((ROWS,), float("-inf"), tl.float32)
    total_R = tl.zeros((ROWS,), tl.float32)
    out_RD = tl.zeros((ROWS, DIM), tl.float32)
    first, last = tl.load(first_ptr + row), tl.load(block_ptr + tl.minimum(row + ROWS, num_tokens) - 1)
    own = first + (tl.load(block_ptr + row) - first) // BLOCKS * BLOCKS  # before it no query's own block lies
    for begin in range(first, own, BLOCKS):
        largest_R, total_R, out_RD = _add_tile(
            q_RD, k_ptr, v_ptr, length_ptr, begin, num_blocks, kv_head, num_kv_heads, head_dim, block_R, first_R,
            seen_R, factor, largest_R, total_R, out_RD, False, ROWS, SLOTS, BLOCKS, DIM, PRECISION,
        )  # fmt: skip
    for begin in range(own, last + 1, BLOCKS):
        largest_R, total_R, out_RD = _add_tile(
            q_RD, k_ptr, v_ptr, length_ptr, begin, num_blocks, kv_head, num_kv_heads, head_dim, block_R, first_R,
            seen_R, factor, largest_R, total_R, out_RD, True, ROWS, SLOTS, BLOCKS, DIM, PRECISION,
        )  # fmt: skip
    total_R = tl.where(is_row_R, total_R, 1.0)
    tl.store(lse_ptr + head * num_tokens + row_R, largest_R + tl.log2(total_R), mask=is_row_R)
    out_RD /= total_R[:, None]
    store_rows(out_ptr, out_RD, tl.program_id(2), row_R, num_tokens, head, num_heads, dim_D, head_dim)


@triton.jit
def _add_queries_tile(
    q_RD, k_ptr, v_ptr, dout_RD, lse_R, delta_R, length_ptr, begin, num_blocks, kv_head, num_kv_heads, head_dim,
    block_R, first_R, seen_R, factor, dq_RD, HAS_OWN: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dim_D, key_C = tl.arange(0, DIM), begin * SLOTS + tl.arange(0, BLOCKS * SLOTS)
    k_CD = load_rows(k_ptr, tl.program_id(2), key_C, num_blocks * SLOTS, kv_head, num_kv_heads, dim_D, head_dim)
    v_CD = load_rows(v_ptr, tl.program_id(2), key_C, num_blocks * SLOTS, kv_head, num_kv_heads, dim_D, head_dim)
    _, dscores_RC = differentiate_tile(
        q_RD, k_CD, v_CD, dout_RD, lse_R, delta_R, length_ptr, begin, num_blocks, block_R, first_R, seen_R, factor,
        HAS_OWN, ROWS, SLOTS, BLOCKS, PRECISION,
    )  # fmt: skip
    return dq_RD + tl.dot(dscores_RC.to(k_CD.dtype), k_CD, input_precision=PRECISION)


@triton.jit
def _add_keys_tile(
    q_ptr, k_CD, v_CD, dout_ptr, lse_ptr, delta_ptr, block_ptr, first_ptr, seen_ptr, length_ptr, low, end, num_tokens,
    begin, num_blocks, head, num_heads, head_dim, factor, dk_CD, dv_CD, HAS_OWN: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_R, dim_D = low + tl.arange(0, ROWS), tl.arange(0, DIM)
    is_row_R = row_R < end
    block_R = tl.load(block_ptr + row_R, mask=is_row_R, other=-1)
    first_R = tl.load(first_ptr + row_R, mask=is_row_R, other=num_blocks)
    seen_R = tl.load(seen_ptr + row_R, mask=is_row_R, other=0)
    q_RD = load_rows(q_ptr, tl.program_id(2), row_R, end, head, num_heads, dim_D, head_dim)
    dout_RD = load_rows(dout_ptr, tl.program_id(2), row_R, end, head, num_heads, dim_D, head_dim)
    lse_R = tl.load(lse_ptr + head * num_tokens + row_R, mask=is_row_R, other=0.0)
    delta_R = tl.load(delta_ptr + head * num_tokens + row_R, mask=is_row_R, other=0.0)
    weights_RC, dscores_RC = differentiate_tile(
        q_RD, k_CD, v_CD, dout_RD, lse_R, delta_R, length_ptr, begin, num_blocks, block_R, first_R, seen_R, factor,
        HAS_OWN, ROWS, SLOTS, BLOCKS, PRECISION,
    )  # fmt: skip
    dv_CD += tl.dot(tl.trans(weights_RC.to(dout_RD.dtype)), dout_RD, input_precision=PRECISION)
    dk_CD += tl.dot(tl.trans(dscores_RC.to(q_RD.dtype)), q_RD, input_precision=PRECISION)
    return dk_CD, dv_CD


@triton.jit
def _backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    block_ptr,
    first_ptr,
    seen_ptr,
    length_ptr,
    start_ptr,
    end_ptr,
    num_tokens,
    num_blocks,
    num_heads,
    group_size,
    head_dim: tl.constexpr,
    scale,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    row_R, dim_D = row + tl.arange(0, ROWS), tl.arange(0, DIM)
    head = tl.program_id(1)
    kv_head, num_kv_heads = head // group_size, num_heads // group_size
    is_row_R = row_R < num_tokens
    block_R = tl.load(block_ptr + row_R, mask=is_row_R, other=-1)
    first_R = tl.load(first_ptr + row_R, mask=is_row_R, other=num_blocks)
    seen_R = tl.load(seen_ptr + row_R, mask=is_row_R, other=0)
    q_RD = load_rows(q_ptr, tl.program_id(2), row_R, num_tokens, head, num_heads, dim_D, head_dim)
    dout_RD = load_rows(dout_ptr, tl.program_id(2), row_R, num_tokens, head, num_heads, dim_D, head_dim)
    lse_R = tl.load(lse_ptr + head * num_tokens + row_R, mask=is_row_R, other=0.0)
    delta_R = tl.load(delta_ptr + head * num_tokens + row_R, mask=is_row_R, other=0.0)
    factor = scale * LOG2_E
    dq_RD = tl.zeros((ROWS, DIM), tl.float32)
    first, last = tl.load(first_ptr + row), tl.load(block_ptr + tl.minimum(row + ROWS, num_tokens) - 1)
    own = first + (tl.load(block_ptr + row) - first) // BLOCKS * BLOCKS
    for begin in range(first, own, BLOCKS):
        dq_RD = _add_queries_tile(
            q_RD, k_ptr, v_ptr, dout_RD, lse_R, delta_R, length_ptr, begin, num_blocks, kv_head, num_kv_heads,
            head_dim, block_R, first_R, seen_R, factor, dq_RD, False, ROWS, SLOTS, BLOCKS, DIM, PRECISION,
        )  # fmt: skip
    for begin in range(own, last + 1, BLOCKS):
        dq_RD = _add_queries_tile(
            q_RD, k_ptr, v_ptr, dout_RD, lse_R, delta_R, length_ptr, begin, num_blocks, kv_head, num_kv_heads,
            head_dim, block_R, first_R, seen_R, factor, dq_RD, True, ROWS, SLOTS, BLOCKS, DIM, PRECISION,
        )  # fmt: skip
    store_rows(dq_ptr, dq_RD * scale, tl.program_id(2), row_R, num_tokens, head, num_heads, dim_D, head_dim)


@triton.jit
def _backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    block_ptr,
    first_ptr,
    seen_ptr,
    length_ptr,
    start_ptr,
    end_ptr,
    num_tokens,
    num_blocks,
    num_heads,
    group_size,
    head_dim: tl.constexpr,
    scale,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    begin, kv_head = tl.program_id(0) * BLOCKS, tl.program_id(1)
    num_kv_heads = num_heads // group_size
    dim_D, key_C = tl.arange(0, DIM), begin * SLOTS + tl.arange(0, BLOCKS * SLOTS)
    k_CD = load_rows(k_ptr, tl.program_id(2), key_C, num_blocks * SLOTS, kv_head, num_kv_heads, dim_D, head_dim)
    v_CD = load_rows(v_ptr, tl.program_id(2), key_C, num_blocks * SLOTS, kv_head, num_kv_heads, dim_D, head_dim)
    factor = scale * LOG2_E
    start, behind = tl.load(start_ptr + begin), tl.load(start_ptr + tl.minimum(begin + BLOCKS, num_blocks))
    end = tl.load(end_ptr + tl.minimum(begin + BLOCKS, num_blocks) - 1)
    own = start + (behind - start + ROWS - 1) // ROWS * ROWS  # from it on no query's own block is here
    dk_CD = tl.zeros((BLOCKS * SLOTS, DIM), tl.float32)
    dv_CD = tl.zeros((BLOCKS * SLOTS, DIM), tl.float32)
    for member in range(group_size):
        head = kv_head * group_size + member
        for low in range(start, own, ROWS):
            dk_CD, dv_CD = _add_keys_tile(
                q_ptr, k_CD, v_CD, dout_ptr, lse_ptr, delta_ptr, block_ptr, first_ptr, seen_ptr, length_ptr, low, end,
                num_tokens, begin, num_blocks, head, num_heads, head_dim, factor, dk_CD, dv_CD, True, ROWS, SLOTS,
                BLOCKS, DIM, PRECISION,
            )  # fmt: skip
        for low in range(own, end, ROWS):
            dk_CD, dv_CD = _add_keys_tile(
                q_ptr, k_CD, v_CD, dout_ptr, lse_ptr, delta_ptr, block_ptr, first_ptr, seen_ptr, length_ptr, low, end,
                num_tokens, begin, num_blocks, head, num_heads, head_dim, factor, dk_CD, dv_CD, False, ROWS, SLOTS,
                BLOCKS, DIM, PRECISION,
            )  # fmt: skip
    batch, num_slots = tl.program_id(2), num_blocks * SLOTS
    store_rows(dk_ptr, dk_CD * scale, batch, key_C, num_slots, kv_head, num_kv_heads, dim_D, head_dim)
    store_rows(dv_ptr, dv_CD, batch, key_C, num_slots, kv_head, num_kv_heads, dim_D, head_dim)
