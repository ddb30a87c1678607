"""Attention in training, by name: called as ``sequence_parallel_attention`` is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from longctx.training.cca_attention import CCAAttention
from longctx.training.config import TrainAttentionConfig
from longctx.training.landmark_attention import LandmarkAttention
from longctx.training.sf_attention import SFAttention
from parallel.attention import sequence_parallel_attention
from parallel.registry import Registry

Attend = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class Method:
    """An attention, and what of a sequence it is called with beside queries, keys and values."""

    attend: Attend
    evaluates: bool = True  # also evaluation goes through it, which is dense otherwise
    rotates: bool = False  # it gets q and k before RoPE, and ``rotate``
    sees_landmarks: bool = False  # it gets ``is_landmark``


ATTENTION = Registry(
    "attention in training",
    {name: f"longctx.training.attention:make_{name}" for name in ("dense", "sf", "landmark", "cca")},
)


def make_dense(_: TrainAttentionConfig) -> Method:
    """Every token that the mask lets a query see."""
    return Method(sequence_parallel_attention)


def make_sf(config: TrainAttentionConfig) -> Method:
    """Shifted sparse groups with sinks (SinkLoRA)."""
    return Method(SFAttention(config).attend, evaluates=False)


def make_landmark(_: TrainAttentionConfig) -> Method:
    """Blocks of tokens behind the landmark tokens that stand for them."""
    return Method(LandmarkAttention().attend, sees_landmarks=True)


def make_cca(config: TrainAttentionConfig) -> Method:
    """Groups of far tokens as cores, and near ones as they are."""
    return Method(CCAAttention(config).attend, rotates=True)
