"""Run by ``test_method_kernels.py`` under Triton's interpreter, or on a GPU: prints each case's worst errors as JSON.

python -m tests.longctx.methods.interpreted_landmark [cuda]
"""

import json
import sys

import torch

from longctx.attention.landmark import attend_with_torch
from longctx.attention.landmark_blocks import find_blocks
from longctx.attention.triton_landmark import attend_with_triton

CASES = (  # length, block, heads, kv heads, head dim, documents
    (150, 16, 4, 2, 16, (0, 150)),
    (131, 51, 2, 1, 64, (0, 131)),
    (97, 9, 3, 3, 24, (0, 40, 41, 97)),
    (256, 64, 2, 2, 16, (0, 128, 256)),
)
LARGE = (
    (1000, 64, 8, 2, 64, (0, 1000)),
    (2048, 64, 8, 2, 128, (0, 1100, 2048)),
    (777, 16, 4, 4, 256, (0, 777)),
    (1500, 51, 8, 4, 128, (0, 300, 1500)),
)


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    worst = {}
    for length, block, heads, kv_heads, head_dim, bounds in CASES + (LARGE if device == "cuda" else ()):
        for dtype in dtypes:
            generator = torch.Generator().manual_seed(length)
            shapes = [(1, length, h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
            *given, dout = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
            is_landmark = torch.arange(length) % block == block - 1
            blocks, scale = find_blocks(is_landmark, bounds), head_dim**-0.5
            exact = [x.double().requires_grad_() for x in given]
            expected = attend_with_torch(*exact, blocks, scale)
            expected.backward(dout.double())
            inputs = [x.to(device).requires_grad_() for x in given]
            out = attend_with_triton(*inputs, blocks, scale)
            out.backward(dout.to(device))
            pairs = zip((out, *(x.grad for x in inputs)), (expected, *(x.grad for x in exact)), strict=True)
            errors = [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in pairs]
            worst[f"{length} {block} {heads}:{kv_heads} {head_dim} {dtype}"] = errors
    sys.stdout.write(json.dumps(worst))


if __name__ == "__main__":
    main()
