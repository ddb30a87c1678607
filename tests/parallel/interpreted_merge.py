"""Run by ``test_triton_merge.py`` under Triton's interpreter: prints, as JSON, each case and its worst errors
of output and log-sum-exp."""

import json
import sys
from itertools import product

import torch

from parallel.triton_merge import merge_with_triton_
from tests.parallel.merge_reference import make_case, merge_reference

SHAPES = ((1, 1, 1, 8), (2, 37, 6, 16), (1, 5, 3, 24), (1, 70, 2, 128), (3, 4, 1, 80))
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
)
LAYOUTS = ("whole", "cut", "transposed")


def main() -> None:
    worst = {}
    for shape, (dtype, partial_dtype), layout in product(SHAPES, DTYPES, LAYOUTS):
        out, lse, partial_out, partial_lse = make_case(shape, dtype, partial_dtype, layout)
        expected_out, expected_lse = merge_reference(out, lse, partial_out, partial_lse)
        case = out, lse, partial_out, partial_lse
        merge_with_triton_(*(x[0] if shape[0] == 1 else x for x in case))  # without a batch dimension
        seen = torch.isfinite(expected_lse)
        assert torch.equal(seen, torch.isfinite(lse)) and not torch.isnan(lse).any()
        assert not out[~seen].any()
        lse_error = (lse - expected_lse)[seen].abs().max().item() if seen.any() else 0.0
        worst[f"{shape} {dtype} {partial_dtype} {layout}"] = (out - expected_out).abs().max().item(), lse_error
    sys.stdout.write(json.dumps(worst))


if __name__ == "__main__":
    main()
