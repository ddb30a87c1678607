"""The Triton kernels of landmark and CCA attention against torch in float64: under the interpreter, and on a GPU."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[3]
METHODS = ("landmark", "cca", "paged")
MOST = {"float32": 2e-6, "bfloat16": 2e-2}  # of a whole tensor's norm


def run(method, *arguments, **environment):
    """Worst relative errors of output and gradients of each case, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.longctx.methods.interpreted_{method}", *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    worst = json.loads(done.stdout)
    for case, errors in worst.items():
        assert max(errors) <= MOST[case.rpartition(".")[2]], (case, errors)
    return worst


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (1 GB; pip install triton)")
@pytest.mark.parametrize("method", METHODS)
def test_kernels_are_right_under_the_interpreter(method):
    """Triton reads the variable when it is imported."""
    assert len(run(method, TRITON_INTERPRET="1")) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_kernels_are_right_on_a_gpu(method):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert len(run(method, "cuda")) == 16
