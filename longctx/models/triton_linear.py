"""One row times a weight matrix on a GPU, in Triton: what a decode step of one sequence does all the time.

Every weight is read once, so nothing counts but the memory's speed: a program owns a few outputs and reads their rows
in long runs. Products of two rows or more are the BLAS library's.

Legend: N outputs of a program, K columns of a tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl

OUTPUTS = 2  # of a program
COLUMNS = 1024  # of a tile
NUM_WARPS = 4


def multiply_one_row(x_1C: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x W^T + b``, ``[1, out_features]``; sums in float32.

    Args:
        x_1C: ``[1, in_features]``, contiguous.
        weight: ``[out_features, in_features]``, contiguous, in x's dtype.
        bias: ``[out_features]`` or None.
    """
    num_outputs, num_columns = weight.shape
    y_1C = x_1C.new_empty((1, num_outputs))
    kernel: Any = _multiply
    with torch.cuda.device_of(x_1C):
        kernel[(triton.cdiv(num_outputs, OUTPUTS),)](
            x_1C, weight, weight if bias is None else bias, y_1C, num_outputs, num_columns,
            OUTPUTS=OUTPUTS, COLUMNS=COLUMNS, HAS_BIAS=bias is not None, num_warps=NUM_WARPS,
        )  # fmt: skip
    return y_1C


@triton.jit
def _multiply(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_outputs,
    num_columns,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    output_N, column_K = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, COLUMNS)
    is_output_N = output_N < num_outputs
    row_N = weight_ptr + output_N.to(tl.int64) * num_columns
    sum_NK = tl.zeros([OUTPUTS, COLUMNS], tl.float32)
    for begin in range(0, num_columns, COLUMNS):
        is_column_K = begin + column_K < num_columns
        x_K = tl.load(x_ptr + begin + column_K, mask=is_column_K, other=0.0).to(tl.float32)
        is_there_NK = is_output_N[:, None] & is_column_K[None, :]
        weight_NK = tl.load(row_N[:, None] + begin + column_K[None, :], mask=is_there_NK, other=0.0)
        sum_NK += weight_NK.to(tl.float32) * x_K[None, :]
    y_N = tl.sum(sum_NK, 1)
    if HAS_BIAS:
        y_N += tl.load(bias_ptr + output_N, mask=is_output_N, other=0.0).to(tl.float32)
    tl.store(y_ptr + output_N, y_N.to(y_ptr.dtype.element_ty), mask=is_output_N)
