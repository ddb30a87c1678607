"""Run by ``test_method_kernels.py``: compiles the Triton kernels for a Hopper GPU on a machine without one.

What the interpreter takes a compiler may refuse: a helper that returns another shape on each side of an ``if``, say.
Kernels are called as always, on the CPU's tensors; each launch only compiles. Prints how many of each were compiled.

python -m tests.longctx.methods.compiled_kernels
"""

import json
import sys
from collections import Counter
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from longctx.attention.backend import HeadNorm
from longctx.attention.batch import AttentionShape, HeadPages, KeyRanges
from longctx.attention.landmark_blocks import find_blocks
from longctx.attention.triton_cca import AttendWithTriton
from longctx.attention.triton_decode import attend_newest
from longctx.attention.triton_elementwise import add_rms_norm_rows, rms_norm_rows, rotate_and_store, silu_mul_rows
from longctx.attention.triton_landmark import attend_with_triton
from longctx.attention.triton_paged import attend_pages_with_triton, attend_ranges_with_triton
from longctx.models.triton_linear import multiply_one_row
from parallel.triton_merge import merge_with_triton_
from tests.longctx.methods.interpreted_elementwise import make_batch
from tests.longctx.methods.interpreted_paged import make_pool

HEADS, KV_HEADS, TOKENS, SIZE = 8, 2, 128, 64
COMPILED: Counter[str] = Counter()


class Hopper:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead(kernel: Any, grid: Any) -> Any:
    """``kernel[grid]``."""

    def launch(*args: Any, **kwargs: Any) -> None:
        kernel.run(*args, grid=(1,), warmup=True, **kwargs)
        COMPILED[kernel.fn.__name__] += 1

    return launch


def compile_serving(dtype: torch.dtype, head_dim: int) -> None:
    shape = AttentionShape(0, HEADS, KV_HEADS, head_dim, head_dim**-0.5)
    pool = make_pool("nhd", SIZE, KV_HEADS, head_dim, dtype, 4, "cpu")
    q = torch.randn(TOKENS, HEADS, head_dim, dtype=dtype)
    rows = torch.full((TOKENS,), 100, dtype=torch.int32)
    tables, borders = torch.zeros(1, 4, dtype=torch.int32), torch.tensor([0, TOKENS], dtype=torch.int32)
    attend_newest(q[:1], shape, pool, tables, rows[:1], max_kv_len=256)
    attend_ranges_with_triton(q, shape, KeyRanges(borders, tables, rows, rows), pool, first_kv_head=0)
    one_page = torch.zeros(1, dtype=torch.int64)
    attend_pages_with_triton(q[:, 0], shape, HeadPages(borders, one_page, one_page), pool)
    weight = torch.ones(head_dim)
    for norm in (None, HeadNorm(weight, weight, 1e-6)):
        batch = make_batch(pool, 4, head_dim, torch.Generator(), "cpu")
        rotate_and_store(torch.randn(4, (HEADS + 2 * KV_HEADS) * head_dim, dtype=dtype), norm, shape, batch)
    x, gain = torch.randn(4, 4096, dtype=dtype), torch.ones(4096)
    rms_norm_rows(x, gain, 1e-6)
    add_rms_norm_rows(x, x, gain, 1e-6)
    silu_mul_rows(x)
    multiply_one_row(x[:1], torch.randn(64, 4096, dtype=dtype), None)
    merge_with_triton_(q.float()[None], q[None, ..., 0].float(), q[None], q[None, ..., 0].float())


def compile_methods(dtype: torch.dtype, head_dim: int) -> None:
    shapes = [(1, TOKENS, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    for block_size in (SIZE, 16):  # a tile is one block, and several
        blocks = find_blocks(torch.arange(TOKENS) % block_size == block_size - 1, (0, TOKENS))
        out = attend_with_triton(q, k, v, blocks, head_dim**-0.5)
        out.backward(torch.ones_like(out))
    cores = [x[:, ::16].detach().contiguous().requires_grad_() for x in (k, v)]
    out = AttendWithTriton.apply(q, k, v, *cores, 16, 32, head_dim**-0.5)
    out.backward(torch.ones_like(out))


def main() -> None:
    driver.set_active(Hopper())
    JITFunction.__getitem__ = compile_instead
    for dtype, head_dim in ((torch.bfloat16, 128), (torch.float32, 64)):
        compile_serving(dtype, head_dim)
        compile_methods(dtype, head_dim)
    sys.stdout.write(json.dumps(COMPILED))


if __name__ == "__main__":
    main()
