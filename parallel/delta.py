"""Lets delta = rowsum(dO * O) travel instead of O, where a kernel's backward asks for O.

A flash backward (FlashAttention-2, arXiv 2307.08691, algorithm 2) reads O for nothing but delta. Any O with that
delta will do, and one can be made from dO alone: O itself need not travel with Q.
"""

import torch

from parallel.tile_attention import accumulator_dtype


def output_with(delta_1: torch.Tensor, dout_D: torch.Tensor) -> torch.Tensor:
    """Some O with rowsum(dO * O) = delta: dO itself, scaled row by row.

    Its elements are no larger than O's norm. In half precision it is rounded once an element, as O is, and all products
    with dO have one sign: delta is met better than by O.

    Args:
        delta_1: ``[..., 1]``, float32 (float64).
        dout_D: ``[..., D]``, any floating dtype, which is the result's.
    """
    dtype = accumulator_dtype(dout_D.dtype)
    largest = torch.linalg.vector_norm(dout_D, float("inf"), -1, keepdim=True)
    largest = largest.clamp_min(torch.finfo(dout_D.dtype).tiny)
    direction = dout_D / largest  # squares of dO itself could underflow
    squared = torch.linalg.vector_norm(direction, 2, -1, keepdim=True, dtype=dtype).square()
    squared = squared.clamp_min(torch.finfo(dtype).tiny)
    return direction.mul_(delta_1 / largest / squared)  # computed in float32, rounded once
