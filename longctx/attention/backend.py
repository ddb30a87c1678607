"""The interface of an attention implementation over paged KV.

An implementation overrides ``store`` and ``attend``; one that fuses the steps before them overrides ``prepare``, one
with a kernel for ranges of keys ``attend_ranges``.
Shape legend: T tokens, S rows of ranges, H query heads, K KV heads, D head dim, C = (H + 2K) * D.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch

from longctx.attention.batch import AttentionShape, HeadPages, KeyRanges, PackedBatch
from longctx.attention.range_attention import attend_key_ranges
from memory.pages import PagePool


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norm over the head dimension of queries and keys (Qwen3); weights are float32 ``[head_dim]``."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float


class AttentionBackend(ABC):
    """Stores a batch's keys and values into pages and attends to everything stored."""

    name: str
    kv_order: str  # one of memory.layout.ORDERS
    page_sizes: tuple[int, ...]  # allowed, preferred first; empty: any
    preferred_page_size = 16  # where any is allowed
    max_group: int | None = None  # query heads per KV head at most; None: any number
    depends_on_length = (
        True  # whether positions are those in the sequence, as RoPE that depends on its length takes them
    )
    graph_capturable = False  # whether decode reads no tensor's values on the host, and stores no row without a slot

    @classmethod
    @abstractmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why this implementation cannot run here, or None if it can."""

    @abstractmethod
    def store(self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> None:
        """Write rotated keys and values to ``batch.slots_T``."""

    @abstractmethod
    def attend(self, q_THD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        """Causal attention of each segment's queries over its pages; returns ``[T, H * D]`` in q's dtype."""

    def attend_ranges(
        self,
        q_SHD: torch.Tensor,
        shape: AttentionShape,
        ranges: KeyRanges,
        pool: PagePool,
        *,
        first_kv_head: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of rotated queries to ranges of keys: a partial result, to be merged with other keys'.

        Args:
            q_SHD: ``[S, H, D]``; H and K are those of ``shape`` and may be a part of the model's heads.
            shape: its window is not looked at: ``ranges`` are the mask, and the whole of it.
            first_kv_head: the pool's KV head that the first ``H / K`` query heads read.

        Returns:
            Output, float32 ``[S, H, D]``, and the natural logarithm of the sum of ``exp(scale * q . k)``, float32
            ``[S, H]``. A row that sees nothing is zeros and minus infinity.
        """
        if has_paged_kernels(q_SHD.device):
            from longctx.attention.triton_paged import attend_ranges_with_triton

            return attend_ranges_with_triton(q_SHD, shape, ranges, pool, first_kv_head=first_kv_head)
        return attend_key_ranges(q_SHD, shape, ranges, pool, first_kv_head=first_kv_head)

    def attend_pages(self, q_SD: torch.Tensor, shape: AttentionShape, seen: HeadPages, pool: PagePool) -> torch.Tensor:
        """Attention of rotated queries of single heads to whole pages; float32 ``[S, D]``.

        Args:
            q_SD: the rows of ``seen``.
            shape: of the layer; its window is not looked at.
        """
        if has_paged_kernels(q_SD.device):
            from longctx.attention.triton_paged import attend_pages_with_triton

            return attend_pages_with_triton(q_SD, shape, seen, pool)
        out_SD = q_SD.new_empty(q_SD.shape, dtype=torch.float32)
        one_head, counts_B = replace(shape, num_heads=1, num_kv_heads=1), seen.cu_seqlens_B1.diff()
        head_S = seen.kv_heads_B.repeat_interleave(counts_B.long(), output_size=len(q_SD))
        for head in seen.kv_heads_B.unique().tolist():
            is_own = seen.kv_heads_B == head
            borders = torch.cat((counts_B.new_zeros(1), counts_B[is_own].cumsum(0, dtype=torch.int32)))
            rows = (head_S == head).nonzero()[:, 0]
            first_S = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
            table = seen.pages_B[is_own, None].int()
            ranges = KeyRanges(borders, table, first_S, first_S + pool.layout.page_size)
            out_SD[rows] = self.attend_ranges(q_SD[rows, None], one_head, ranges, pool, first_kv_head=head)[0][:, 0]
        return out_SD

    def lay_out(self, batch: PackedBatch) -> PackedBatch:
        """What the method makes of a batch of text tokens before the model computes it."""
        return batch

    def prepare(
        self, qkv_TC: torch.Tensor, norm: HeadNorm | None, shape: AttentionShape, batch: PackedBatch
    ) -> torch.Tensor:
        """Split, normalise, rotate and store; returns rotated queries ``[T, H, D]``."""
        num_tokens, dim = qkv_TC.shape[0], shape.head_dim
        heads = qkv_TC.view(num_tokens, -1, dim)
        q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        if norm is not None:
            q, k = rms_norm(q, norm.q_weight, norm.eps), rms_norm(k, norm.k_weight, norm.eps)
        assert batch.cos_TD is not None and batch.sin_TD is not None
        q, k = rotate(q, batch.cos_TD, batch.sin_TD), rotate(k, batch.cos_TD, batch.sin_TD)
        if batch.landmark is not None:  # whose rows have no slots
            text = batch.landmark.text_rows
            k, v, batch = k[text], v[text], replace(batch, slots_T=batch.slots_T[text])
        self.store(k, v, shape, batch)
        return q

    def forward(
        self, qkv_TC: torch.Tensor, norm: HeadNorm | None, shape: AttentionShape, batch: PackedBatch
    ) -> torch.Tensor:
        """One attention layer after the QKV projection; returns ``[T, H * D]``."""
        q_THD = self.prepare(qkv_TC, norm, shape, batch)
        if batch.on_layer is not None:
            batch.on_layer(shape.layer_idx)
        return self.attend(q_THD, shape, batch)

    def rms_norm(self, x_TC: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMS norm over the last dimension; ``weight`` is float32 and already holds any added one (Gemma)."""
        return rms_norm(x_TC, weight, eps)

    def add_rms_norm(
        self, x_TC: torch.Tensor, addend_TC: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """``x += addend`` in place, then its RMS norm."""
        return self.rms_norm(x_TC.add_(addend_TC), weight, eps)

    def silu_mul(self, gate_up_TC: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up`` of ``[T, 2 * I]`` (gate first); returns ``[T, I]``."""
        gate, up = gate_up_TC.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


@cache
def has_paged_kernels(device: torch.device) -> bool:
    """Whether the kernels in Triton run: on GPUs where Triton is installed, which torch's CUDA builds see to."""
    return device.type == "cuda" and find_spec("triton") is not None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension, computed in float32, returned in x's dtype."""
    x_float = x.float()
    return (x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rotate(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (rotate-half form) of the first ``cos.shape[-1]`` dimensions; the rest pass through."""
    dim = cos_TD.shape[-1]
    cos, sin = cos_TD.unsqueeze(1).to(x_THD.dtype), sin_TD.unsqueeze(1).to(x_THD.dtype)
    turned = x_THD[..., :dim]
    half = dim // 2
    swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    rotated = turned * cos + swapped * sin
    return rotated if dim == x_THD.shape[-1] else torch.cat((rotated, x_THD[..., dim:]), dim=-1)
