"""What GPU flash kernels share: pages in ``nhd`` order of 256 tokens, stored by index, read through block tables.

Shape legend: T tokens, B segments, H query heads, K KV heads, D head dim, P pages of a block table.
"""

import torch

from longctx.attention.backend import AttentionBackend
from longctx.attention.batch import AttentionShape, PackedBatch


class FlashPagedAttention(AttentionBackend):
    """Base of the flash implementations; they override ``unsupported`` and ``attend``."""

    kv_order = "nhd"
    page_sizes = (256, 512)  # the kernels take multiples of 256
    graph_capturable = True

    def store(self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> None:
        k_pages, v_pages = batch.pool.views(shape.layer_idx)  # [num_pages, page_size, K, D]
        page_size = batch.pool.layout.page_size
        page, offset = batch.slots_T // page_size, batch.slots_T % page_size
        k_pages[page, offset] = k_TKD.to(k_pages.dtype)
        v_pages[page, offset] = v_TKD.to(v_pages.dtype)


def window_size(shape: AttentionShape) -> tuple[int, int]:
    """The kernels' (left, right) window, both inclusive of the diagonal: left = window - 1, or -1 for no window."""
    return (-1 if shape.window is None else shape.window - 1), 0


def refuse_without_gpu(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no flash kernel can run with these, or None."""
    if device.type != "cuda":
        return f"it runs on a GPU, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return f"head_dim is {head_dim}; it takes multiples of 8 up to 256"
    return None
