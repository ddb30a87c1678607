"""CCA attention on a GPU, in Triton: cores and tokens in one pass, forward and backward.

The formulas are those of ``longctx/attention/cca.py``. Query i sees the cores before n(i) = max(0, (i + 1 - s) // g)
and the tokens from n(i) * g to itself. dQ, the gradients of tokens and those of cores are three kernels; each owns what
it writes, so nothing is added up in global memory.

Legend: R queries of a program, C keys of a tile, D head dim (padded to a power of two); B batch, S tokens, H query
heads, K KV heads.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from longctx.attention.triton_rows import count_stages, load_rows, store_rows

LOG2_E = tl.constexpr(1.4426950408889634)


class AttendWithTriton(torch.autograd.Function):
    """Arguments and result of ``longctx.attention.cca.attend_cores``, on a GPU; products in the tensors' dtype, sums in
    float32."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, core_k: Any, core_v: Any, *sizes: Any) -> torch.Tensor:
        tensors = [x.contiguous() for x in (q, k, v, core_k, core_v)]
        launch = _Launch(*tensors[:2], *sizes)
        out = torch.empty_like(tensors[0])
        lse_BHS = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
        kernel: Any = _forward
        with torch.cuda.device_of(q):
            kernel[launch.query_grid](*tensors, out, lse_BHS, *launch.sizes, **launch.forward)
        ctx.save_for_backward(*tensors, out, lse_BHS)
        ctx.launch = launch
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        *tensors, out, lse_BHS = ctx.saved_tensors
        q, k, v, core_k, core_v = tensors
        dout, launch = gradients[0].contiguous(), ctx.launch
        delta_BHS = (dout.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
        dq, dk, dv, dcore_k, dcore_v = (torch.empty_like(x) for x in tensors)
        queries: Any = _backward_queries
        keys: Any = _backward_keys
        sums = dout, lse_BHS, delta_BHS
        with torch.cuda.device_of(q):
            queries[launch.query_grid](*tensors, *sums, dq, *launch.sizes, **launch.backward_queries)
            for given, targets, is_core in (((k, v), (dk, dv), False), ((core_k, core_v), (dcore_k, dcore_v), True)):
                if given[0].numel():
                    grid = launch.key_grid(given[0].shape[1])
                    keys[grid](
                        q,
                        *given,
                        *sums,
                        *targets,
                        given[0].shape[1],
                        *launch.sizes,
                        IS_CORE=is_core,
                        **launch.backward_keys,
                    )
        return dq, dk, dv, dcore_k, dcore_v, None, None, None


class _Launch:
    """Grids and constants of one call."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, group_size: int, window: int, scale: float) -> None:
        self._batch, num_tokens, num_heads, head_dim = q.shape
        self._num_kv_heads, padded_dim = k.shape[2], max(16, triton.next_power_of_2(head_dim))
        is_wide = padded_dim > 128 or q.element_size() == 4
        self.sizes = num_tokens, num_heads, num_heads // self._num_kv_heads, head_dim, group_size, window, scale
        precision = "ieee" if q.element_size() == 4 else "tf32"  # of float32 only
        common: dict[str, Any] = {"DIM": padded_dim, "COLUMNS": 32 if is_wide else 64, "PRECISION": precision}
        self.forward = common | {"ROWS": 64, "num_warps": 4, "num_stages": 2 if is_wide else count_stages(q.device)}
        self.backward_queries = common | {"ROWS": 32 if is_wide else 64, "num_warps": 4, "num_stages": 2}
        self.backward_keys = common | {"ROWS": 32 if is_wide else 64, "num_warps": 4, "num_stages": 2}
        self.query_grid = lambda meta: (triton.cdiv(num_tokens, meta["ROWS"]), num_heads, self._batch)

    def key_grid(self, num_keys: int) -> Any:
        """Of the kernel that owns keys."""
        return lambda meta: (triton.cdiv(num_keys, meta["COLUMNS"]), self._num_kv_heads, self._batch)


@triton.jit
def _add_tile(
    k_ptr, v_ptr, batch, key_C, num_keys, head, num_heads, dim_D, head_dim,
    low_R, stop_R, q_RD, factor, largest_R, total_R, out_RD, IS_MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys from ``low_R`` up to ``stop_R``."""
    k_CD = load_rows(k_ptr, batch, key_C, num_keys, head, num_heads, dim_D, head_dim)
    scores_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision=PRECISION) * factor
    if IS_MASKED:
        is_seen_RC = (key_C[None, :] >= low_R[:, None]) & (key_C[None, :] < stop_R[:, None])
        scores_RC = tl.where(is_seen_RC, scores_RC, float("-inf"))
    new_R = tl.maximum(largest_R, tl.max(scores_RC, 1))
    shift_R = tl.where(new_R == float("-inf"), 0.0, new_R)
    weights_RC = tl.exp2(scores_RC - shift_R[:, None])
    kept_R = tl.exp2(largest_R - shift_R)
    v_CD = load_rows(v_ptr, batch, key_C, num_keys, head, num_heads, dim_D, head_dim)
    out_RD = out_RD * kept_R[:, None] + tl.dot(weights_RC.to(v_CD.dtype), v_CD, input_precision=PRECISION)
    return new_R, total_R * kept_R + tl.sum(weights_RC, 1), out_RD


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    core_k_ptr,
    core_v_ptr,
    out_ptr,
    lse_ptr,
    num_tokens,
    num_heads,
    members,
    head_dim: tl.constexpr,
    group_size,
    window,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # late queries see most: they are begun first
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head, num_kv_heads, num_cores = head // members, num_heads // members, num_tokens // group_size
    row_R, dim_D, column_C = row + tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, COLUMNS)
    end = tl.minimum(row + ROWS, num_tokens)
    cores_R = tl.maximum(row_R + 1 - window, 0) // group_size
    least, most = tl.maximum(row + 1 - window, 0) // group_size, tl.maximum(end - window, 0) // group_size
    q_RD = load_rows(q_ptr, batch, row_R, num_tokens, head, num_heads, dim_D, head_dim)
    factor = scale * LOG2_E
    largest_R = tl.full((ROWS,), float("-inf"), tl.float32)
    total_R = tl.zeros((ROWS,), tl.float32)
    out_RD = tl.zeros((ROWS, DIM), tl.float32)
    none_R = tl.zeros((ROWS,), tl.int32)
    whole = least // COLUMNS * COLUMNS
    for begin in range(0, whole, COLUMNS):
        largest_R, total_R, out_RD = _add_tile(
            core_k_ptr, core_v_ptr, batch, begin + column_C, num_cores, kv_head, num_kv_heads, dim_D, head_dim,
            none_R, cores_R, q_RD, factor, largest_R, total_R, out_RD, False, PRECISION,
        )  # fmt: skip
    for begin in range(whole, most, COLUMNS):
        largest_R, total_R, out_RD = _add_tile(
            core_k_ptr, core_v_ptr, batch, begin + column_C, num_cores, kv_head, num_kv_heads, dim_D, head_dim,
            none_R, cores_R, q_RD, factor, largest_R, total_R, out_RD, True, PRECISION,
        )  # fmt: skip
    low = least * group_size
    high = low + (most * group_size - low + COLUMNS - 1) // COLUMNS * COLUMNS  # from it on every query's window
    whole = high + tl.maximum(row - high, 0) // COLUMNS * COLUMNS
    for begin in range(low, high, COLUMNS):
        largest_R, total_R, out_RD = _add_tile(
            k_ptr, v_ptr, batch, begin + column_C, num_tokens, kv_head, num_kv_heads, dim_D, head_dim,
            cores_R * group_size, row_R + 1, q_RD, factor, largest_R, total_R, out_RD, True, PRECISION,
        )  # fmt: skip
    for begin in range(high, whole, COLUMNS):
        largest_R, total_R, out_RD = _add_tile(
            k_ptr, v_ptr, batch, begin + column_C, num_tokens, kv_head, num_kv_heads, dim_D, head_dim,
            cores_R * group_size, row_R + 1, q_RD, factor, largest_R, total_R, out_RD, False, PRECISION,
        )  # fmt: skip
    for begin in range(whole, end, COLUMNS):
        largest_R, total_R, out_RD = _add_tile(
            k_ptr, v_ptr, batch, begin + column_C, num_tokens, kv_head, num_kv_heads, dim_D, head_dim,
            cores_R * group_size, row_R + 1, q_RD, factor, largest_R, total_R, out_RD, True, PRECISION,
        )  # fmt: skip
    total_R = tl.where(row_R < num_tokens, total_R, 1.0)
    at_R = (batch.to(tl.int64) * num_heads + head) * num_tokens + row_R
    tl.store(lse_ptr + at_R, largest_R + tl.log2(total_R), mask=row_R < num_tokens)
    store_rows(out_ptr, out_RD / total_R[:, None], batch, row_R, num_tokens, head, num_heads, dim_D, head_dim)


@triton.jit
def _gradients(
    q_RD, k_CD, v_CD, dout_RD, lse_R, delta_R, is_seen_RC, factor, PRECISION: tl.constexpr
):  # fmt: skip
    """A tile's weights and the gradients of its scores, both ``[R, C]``."""
    scores_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision=PRECISION) * factor
    weights_RC = tl.where(is_seen_RC, tl.exp2(scores_RC - lse_R[:, None]), 0.0)
    dweights_RC = tl.dot(dout_RD, tl.trans(v_CD), input_precision=PRECISION)
    return weights_RC, weights_RC * (dweights_RC - delta_R[:, None])


@triton.jit
def _backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    core_k_ptr,
    core_v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    num_tokens,
    num_heads,
    members,
    head_dim: tl.constexpr,
    group_size,
    window,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head, num_kv_heads, num_cores = head // members, num_heads // members, num_tokens // group_size
    row_R, dim_D, column_C = row + tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, COLUMNS)
    end = tl.minimum(row + ROWS, num_tokens)
    cores_R = tl.maximum(row_R + 1 - window, 0) // group_size
    least, most = tl.maximum(row + 1 - window, 0) // group_size, tl.maximum(end - window, 0) // group_size
    q_RD = load_rows(q_ptr, batch, row_R, num_tokens, head, num_heads, dim_D, head_dim)
    dout_RD = load_rows(dout_ptr, batch, row_R, num_tokens, head, num_heads, dim_D, head_dim)
    at_R = (batch.to(tl.int64) * num_heads + head) * num_tokens + row_R
    lse_R = tl.load(lse_ptr + at_R, mask=row_R < num_tokens, other=0.0)
    delta_R = tl.load(delta_ptr + at_R, mask=row_R < num_tokens, other=0.0)
    factor = scale * LOG2_E
    dq_RD = tl.zeros((ROWS, DIM), tl.float32)
    for begin in range(0, most, COLUMNS):
        key_C = begin + column_C
        k_CD = load_rows(core_k_ptr, batch, key_C, num_cores, kv_head, num_kv_heads, dim_D, head_dim)
        v_CD = load_rows(core_v_ptr, batch, key_C, num_cores, kv_head, num_kv_heads, dim_D, head_dim)
        is_seen_RC = key_C[None, :] < cores_R[:, None]
        _, dscores_RC = _gradients(q_RD, k_CD, v_CD, dout_RD, lse_R, delta_R, is_seen_RC, factor, PRECISION)
        dq_RD += tl.dot(dscores_RC.to(k_CD.dtype), k_CD, input_precision=PRECISION)
    for begin in range(least * group_size, end, COLUMNS):
        key_C = begin + column_C
        k_CD = load_rows(k_ptr, batch, key_C, num_tokens, kv_head, num_kv_heads, dim_D, head_dim)
        v_CD = load_rows(v_ptr, batch, key_C, num_tokens, kv_head, num_kv_heads, dim_D, head_dim)
        is_seen_RC = (key_C[None, :] >= cores_R[:, None] * group_size) & (key_C[None, :] <= row_R[:, None])
        _, dscores_RC = _gradients(q_RD, k_CD, v_CD, dout_RD, lse_R, delta_R, is_seen_RC, factor, PRECISION)
        dq_RD += tl.dot(dscores_RC.to(k_CD.dtype), k_CD, input_precision=PRECISION)
    store_rows(dq_ptr, dq_RD * scale, batch, row_R, num_tokens, head, num_heads, dim_D, head_dim)


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
    num_keys,
    num_tokens,
    num_heads,
    members,
    head_dim: tl.constexpr,
    group_size,
    window,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_CORE: tl.constexpr,
):
    begin, kv_head, batch = tl.program_id(0) * COLUMNS, tl.program_id(1), tl.program_id(2)
    num_kv_heads = num_heads // members
    dim_D, key_C = tl.arange(0, DIM), begin + tl.arange(0, COLUMNS)
    k_CD = load_rows(k_ptr, batch, key_C, num_keys, kv_head, num_kv_heads, dim_D, head_dim)
    v_CD = load_rows(v_ptr, batch, key_C, num_keys, kv_head, num_kv_heads, dim_D, head_dim)
    if IS_CORE:  # a core is seen from the query on that has it window behind it
        start = (begin + 1) * group_size + window - 1
        end = num_tokens
    else:  # a token until its group is seen as a core
        start = begin
        end = tl.minimum(num_tokens, ((begin + COLUMNS - 1) // group_size + 1) * group_size + window - 1)
    dk_CD = tl.zeros((COLUMNS, DIM), tl.float32)
    dv_CD = tl.zeros((COLUMNS, DIM), tl.float32)
    for member in range(members):
        head = kv_head * members + member
        for low in range(start, end, ROWS):
            row_R = low + tl.arange(0, ROWS)
            q_RD = load_rows(q_ptr, batch, row_R, num_tokens, head, num_heads, dim_D, head_dim)
            dout_RD = load_rows(dout_ptr, batch, row_R, num_tokens, head, num_heads, dim_D, head_dim)
            at_R = (batch.to(tl.int64) * num_heads + head) * num_tokens + row_R
            lse_R = tl.load(lse_ptr + at_R, mask=row_R < num_tokens, other=0.0)
            delta_R = tl.load(delta_ptr + at_R, mask=row_R < num_tokens, other=0.0)
            cores_R = tl.maximum(row_R + 1 - window, 0) // group_size
            if IS_CORE:
                is_seen_RC = key_C[None, :] < cores_R[:, None]
            else:
                is_seen_RC = (key_C[None, :] >= cores_R[:, None] * group_size) & (key_C[None, :] <= row_R[:, None])
            is_seen_RC = is_seen_RC & (row_R < num_tokens)[:, None]
            weights_RC, dscores_RC = _gradients(
                q_RD, k_CD, v_CD, dout_RD, lse_R, delta_R, is_seen_RC, scale * LOG2_E, PRECISION
            )
            dv_CD += tl.dot(tl.trans(weights_RC.to(dout_RD.dtype)), dout_RD, input_precision=PRECISION)
            dk_CD += tl.dot(tl.trans(dscores_RC.to(q_RD.dtype)), q_RD, input_precision=PRECISION)
    store_rows(dk_ptr, dk_CD * scale, batch, key_C, num_keys, kv_head, num_kv_heads, dim_D, head_dim)
    store_rows(dv_ptr, dv_CD, batch, key_C, num_keys, kv_head, num_kv_heads, dim_D, head_dim)
