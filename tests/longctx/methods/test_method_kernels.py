"""Triton kernels against torch in higher precision, under the interpreter and on a GPU.

Landmark and CCA attention, decode, and what lies between the products of a layer.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[3]
METHODS = ("landmark", "cca", "paged", "decode", "elementwise", "linear")
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (make kernels)")
MOST = {"float32": 2e-6, "bfloat16": 2e-2}  # of a whole tensor's norm


def run_module(name, *arguments, **environment):
    """What one prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.longctx.methods.{name}", *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(method, *arguments, **environment):
    """Worst relative errors of output and gradients of each case."""
    worst = json.loads(run_module(f"interpreted_{method}", *arguments, **environment))
    for case, errors in worst.items():
        assert max(errors) <= MOST[case.rpartition(".")[2]], (case, errors)
    return worst


@NEEDS_TRITON
@pytest.mark.parametrize("method", METHODS)
def test_kernels_are_right_under_the_interpreter(method):
    """Triton reads the variable when it is imported."""
    assert len(run(method, TRITON_INTERPRET="1")) == 4


@NEEDS_TRITON
def test_kernels_compile_for_a_gpu():
    compiled = json.loads(run_module("compiled_kernels"))
    assert len(compiled) == 11 and all(compiled.values())


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_kernels_are_right_on_a_gpu(method):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert len(run(method, "cuda")) > 8  # as under the interpreter, and larger ones
