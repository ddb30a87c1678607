"""What DeepSpeed is told."""

import pytest
import torch

from longctx.training import deepspeed_engine
from longctx.training.config import DeepSpeedConfig, OptimizerConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "num_bytes"), [("0", 0), ("1000004", 1000004), ("1000006", 1000006), ("1KiB", 1024)])
def test_buckets_of_any_size_are_taken(monkeypatch, dtype, size, num_bytes):
    """DeepSpeed 0.19 asserts that they have an even number of elements."""
    monkeypatch.setattr(deepspeed_engine.dist, "get_backend", lambda: "gloo")
    told = deepspeed_engine._describe(DeepSpeedConfig(bucket_size=size), OptimizerConfig(), dtype, 1, 1)
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        num_elements = told["zero_optimization"][key]
        assert num_elements % 2 == 0
        assert num_elements > 0
        assert abs(num_elements * dtype.itemsize - num_bytes) <= 2 * dtype.itemsize
