"""Arguments that attention functions have in common."""

from collections.abc import Sequence

import torch

from parallel.layout import check_cu_seqlens


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ``ValueError`` unless q, k and v are those of one attention."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not allowed"
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2]:
        raise ValueError(f"{shapes}: [batch, seq, heads, head_dim], k and v alike, seq equal")
    if q.shape[3] != k.shape[3] or not q.shape[3] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}: head_dim is equal, num_heads is a multiple of num_kv_heads")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"q {q.dtype} on {q.device}, k {k.dtype} on {k.device}, v {v.dtype} on {v.device} are not allowed: "
            "one floating dtype, one device"
        )


def document_bounds(cu_seqlens: Sequence[int] | torch.Tensor | None, q: torch.Tensor) -> tuple[int, ...]:
    """Boundaries of the documents of each row of a batch. Raises ``ValueError`` if they are not those of ``q``."""
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(f"cu_seqlens with batch {q.shape[0]} is not allowed: packed documents need batch 1")
    return check_cu_seqlens(cu_seqlens, q.shape[1]) or (0, q.shape[1])
