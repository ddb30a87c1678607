"""Rows of one head, for Triton kernels of attention.

Legend: R rows, D head dim (padded to a power of two).
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, batch, row_R, num_rows, head, num_heads, dim_D, head_dim):
    """``[R, D]`` of ``[batch, num_rows, num_heads, head_dim]``."""
    at_R = (batch.to(tl.int64) * num_rows + row_R) * num_heads + head
    is_there_RD = (row_R < num_rows)[:, None] & (dim_D < head_dim)[None, :]
    return tl.load(ptr + at_R[:, None] * head_dim + dim_D[None, :], mask=is_there_RD, other=0.0)


@triton.jit
def store_rows(ptr, value_RD, batch, row_R, num_rows, head, num_heads, dim_D, head_dim):
    """``value_RD`` to where ``load_rows`` reads."""
    at_R = (batch.to(tl.int64) * num_rows + row_R) * num_heads + head
    is_there_RD = (row_R < num_rows)[:, None] & (dim_D < head_dim)[None, :]
    value_RD = value_RD.to(ptr.dtype.element_ty)
    tl.store(ptr + at_R[:, None] * head_dim + dim_D[None, :], value_RD, mask=is_there_RD)
