"""Run by ``test_method_kernels.py`` under Triton's interpreter, or on a GPU: prints each case's worst errors as JSON.

python -m tests.longctx.methods.interpreted_cca [cuda]
"""

import json
import sys

import torch

from longctx.attention.cca import pool_cores
from longctx.attention.cca_parts import AttendInParts
from longctx.attention.triton_cca import AttendWithTriton

CASES = (  # batch, length, group, window, heads, kv heads, head dim
    (2, 150, 8, 20, 4, 2, 16),
    (1, 130, 16, 5, 2, 1, 64),
    (1, 77, 5, 33, 3, 3, 24),
    (1, 40, 3, 100, 2, 2, 16),
)
LARGE = (
    (2, 1000, 16, 128, 8, 2, 64),
    (1, 3000, 16, 256, 8, 2, 128),
    (1, 777, 4, 64, 4, 4, 256),
    (1, 1500, 50, 33, 8, 4, 128),
)


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    worst = {}
    for batch, length, group_size, window, heads, kv_heads, head_dim in CASES + (LARGE if device == "cuda" else ()):
        for dtype in dtypes:
            generator = torch.Generator().manual_seed(length)
            shapes = [(batch, length, h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
            *given, dout = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
            scale = head_dim**-0.5
            cores = pool_cores(*given, group_size, scale, core_position="last", head_pooling="weights")
            given += [cores.k, cores.v]
            exact = [x.double().requires_grad_() for x in given]
            expected = AttendInParts.apply(*exact, group_size, window, scale)
            expected.backward(dout.double())
            inputs = [x.to(device).requires_grad_() for x in given]
            out = AttendWithTriton.apply(*inputs, group_size, window, scale)
            out.backward(dout.to(device))
            pairs = zip((out, *(x.grad for x in inputs)), (expected, *(x.grad for x in exact)), strict=True)
            errors = [((a.cpu().double() - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in pairs]
            worst[f"{length} {group_size} {window} {heads}:{kv_heads} {head_dim} {dtype}"] = errors
    sys.stdout.write(json.dumps(worst))


if __name__ == "__main__":
    main()
