"""Attention on top of another implementation: what a method or several ranks change, and what they leave to it."""

import torch

from longctx.attention.backend import AttentionBackend
from longctx.attention.batch import AttentionShape, PackedBatch


class OuterAttention(AttentionBackend):
    """Norms, activations, the order of pages and storing are the inner implementation's.

    Args:
        inner: the implementation.
        name: what this one is called.
    """

    def __init__(self, inner: AttentionBackend, name: str) -> None:
        self.inner, self.name = inner, name
        self.kv_order, self.page_sizes, self.max_group = inner.kv_order, inner.page_sizes, inner.max_group

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def store(self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> None:
        self.inner.store(k_TKD, v_TKD, shape, batch)

    def rms_norm(self, x_TC: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self.inner.rms_norm(x_TC, weight, eps)

    def add_rms_norm(
        self, x_TC: torch.Tensor, addend_TC: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return self.inner.add_rms_norm(x_TC, addend_TC, weight, eps)

    def silu_mul(self, gate_up_TC: torch.Tensor) -> torch.Tensor:
        return self.inner.silu_mul(gate_up_TC)
