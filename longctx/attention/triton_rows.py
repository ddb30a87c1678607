"""Rows of one head, for Triton kernels of attention.

Legend: R rows, D head dim (padded to a power of two).
"""

import torch
import triton
import triton.language as tl

LARGE_SHARED = {(8, 0), (9, 0), (10, 0)}  # compute capabilities with 160 KiB of shared memory a block, and more


def count_stages(device: torch.device) -> int:
    """Tiles of keys and values that a forward kernel of head dims up to 128 has in flight."""
    return 3 if device.type == "cuda" and torch.cuda.get_device_capability(device) in LARGE_SHARED else 2


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
