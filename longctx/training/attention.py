"""Attention in training, by name: called as ``sequence_parallel_attention`` is."""

from collections.abc import Callable

import torch

from longctx.training.config import TrainAttentionConfig
from longctx.training.sf_attention import SFAttention
from parallel.attention import sequence_parallel_attention
from parallel.registry import Registry

Attend = Callable[..., torch.Tensor]

ATTENTION = Registry(
    "attention in training",
    {"dense": "longctx.training.attention:make_dense", "sf": "longctx.training.attention:make_sf"},
)


def make_dense(_: TrainAttentionConfig) -> Attend:
    """Every token that the mask lets a query see."""
    return sequence_parallel_attention


def make_sf(config: TrainAttentionConfig) -> Attend:
    """Shifted sparse groups with sinks (SinkLoRA)."""
    return SFAttention(config).attend
