"""Merging: torch's implementation, and the Triton kernel under Triton's interpreter, against float64."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from parallel.merge import choose_merge, merge_partial_, merge_with_torch_
from tests.parallel.merge_reference import make_case, merge_reference

REPOSITORY = Path(__file__).parents[2]
SHAPE = (2, 37, 6, 16)


def test_a_cpu_merges_with_torch():
    assert choose_merge("cpu") is merge_with_torch_


@pytest.mark.parametrize("partial_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["whole", "cut", "transposed"])
def test_merging_is_attention_over_both(partial_dtype, layout):
    out, lse, partial_out, partial_lse = make_case(SHAPE, torch.float32, partial_dtype, layout)
    seen = torch.isfinite(partial_lse)  # which every row of a partial result has
    partial_out[~seen], partial_lse[~seen] = 0.5, -3.0
    expected_out, expected_lse = merge_reference(out, lse, partial_out, partial_lse)
    merge_partial_(out, lse, partial_out, partial_lse)
    torch.testing.assert_close(out, expected_out.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse.float())


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (1 GB; pip install triton)")
def test_the_triton_kernel_is_exact_under_its_interpreter():
    """In a process of its own: Triton reads the variable when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.interpreted_merge"],
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    worst = json.loads(done.stdout)
    assert len(worst) == 60
    for case, (out_error, lse_error) in worst.items():
        most_out, most_lse = (1e-12, 1e-12) if "float64" in case else (1e-6, 1e-4)  # log-sum-exps are up to a thousand
        assert out_error <= most_out and lse_error <= most_lse, case
