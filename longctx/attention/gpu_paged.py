"""What implementations of paged attention on a GPU share: pages in ``nhd`` order, and kernels in Triton for what lies
between a layer's products (``triton_elementwise.py``).

Shape legend: T tokens, B segments, H query heads, K KV heads, D head dim, P pages of a block table.
"""

from importlib.util import find_spec

import torch

from longctx.attention.backend import AttentionBackend, HeadNorm
from longctx.attention.batch import AttentionShape, PackedBatch


class GPUPagedAttention(AttentionBackend):
    """Base of the GPU implementations; they override ``unsupported`` and ``attend``."""

    kv_order = "nhd"
    graph_capturable = True

    def store(self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> None:
        k_pages, v_pages = batch.pool.views(shape.layer_idx)  # [num_pages, page_size, K, D]
        page_size = batch.pool.layout.page_size
        page, offset = batch.slots_T // page_size, batch.slots_T % page_size
        k_pages[page, offset] = k_TKD.to(k_pages.dtype)
        v_pages[page, offset] = v_TKD.to(v_pages.dtype)

    def prepare(
        self, qkv_TC: torch.Tensor, norm: HeadNorm | None, shape: AttentionShape, batch: PackedBatch
    ) -> torch.Tensor:
        if not qkv_TC.is_cuda:
            return super().prepare(qkv_TC, norm, shape, batch)
        from longctx.attention.triton_elementwise import rotate_and_store

        return rotate_and_store(qkv_TC, norm, shape, batch)

    def rms_norm(self, x_TC: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if not x_TC.is_cuda:
            return super().rms_norm(x_TC, weight, eps)
        from longctx.attention.triton_elementwise import rms_norm_rows

        return rms_norm_rows(x_TC, weight, eps)

    def add_rms_norm(
        self, x_TC: torch.Tensor, addend_TC: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if not x_TC.is_cuda:
            return super().add_rms_norm(x_TC, addend_TC, weight, eps)
        from longctx.attention.triton_elementwise import add_rms_norm_rows

        return add_rms_norm_rows(x_TC, addend_TC, weight, eps)

    def silu_mul(self, gate_up_TC: torch.Tensor) -> torch.Tensor:
        if not gate_up_TC.is_cuda:
            return super().silu_mul(gate_up_TC)
        from longctx.attention.triton_elementwise import silu_mul_rows

        return silu_mul_rows(gate_up_TC)


def window_size(shape: AttentionShape) -> tuple[int, int]:
    """The flash kernels' window, (left, right) of the diagonal and with it: left = window - 1, or -1 for no window."""
    return (-1 if shape.window is None else shape.window - 1), 0


def refuse_without_gpu(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no flash kernel can run with these, or None."""
    if device.type == "cuda" and dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8:
        return f"head_dim is {head_dim}; it takes multiples of 8 up to 256"
    return refuse_without_triton(device, head_dim)


def refuse_without_triton(device: torch.device, head_dim: int) -> str | None:
    """Why no kernel of this base class can run, or None."""
    if device.type != "cuda":
        return f"it runs on a GPU, not on {device.type}"
    if head_dim > 256:
        return f"head_dim is {head_dim}; it takes head sizes up to 256"
    return None if find_spec("triton") is not None else "triton is not installed"
