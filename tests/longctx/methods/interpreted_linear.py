"""Run by ``test_method_kernels.py`` under Triton's interpreter, or on a GPU: prints each case's worst errors as JSON.

python -m tests.longctx.methods.interpreted_linear [cuda]
"""

import json
import sys

import torch

from longctx.models.triton_linear import multiply_one_row
from tests.longctx.methods.interpreted_paged import relative_error

CASES = ((7, 64, False), (8, 1024, True), (33, 1100, False), (1, 3000, True))  # outputs, columns, bias
LARGE = ((6144, 4096, False), (4096, 14336, True), (32003, 4096, False))


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    worst = {}
    for num_outputs, num_columns, has_bias in CASES + (LARGE if device == "cuda" else ()):
        for dtype in dtypes:
            generator = torch.Generator().manual_seed(num_columns)
            shapes = (1, num_columns), (num_outputs, num_columns), (num_outputs,)
            x, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
            expected = x.double() @ weight.double().t() + (bias.double() if has_bias else 0)
            got = multiply_one_row(x, weight, bias if has_bias else None)
            worst[f"{num_outputs} {num_columns} {has_bias} {dtype}"] = [relative_error(got, expected)]
    sys.stdout.write(json.dumps(worst))


if __name__ == "__main__":
    main()
