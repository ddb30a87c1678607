"""The keys of landmarks: what stays near the compute, whatever tier the blocks themselves are in.

One key for each page and layer. Pages are numbered as in the pool whose blocks they stand for; a page that is given to
another block gets that block's landmark once it is full, and its key is not read before.
"""

import torch

from memory.layout import KVLayout
from memory.pages import DTYPES


class LandmarkKeys:
    """Keys by layer and page.

    Args:
        layout: of the pages; gives layers, KV heads, head size and dtype.
        num_pages: of the pool.
        device: near the compute.

    Shape legend: L landmarks, K KV heads, D head dim.
    """

    def __init__(self, layout: KVLayout, num_pages: int, *, device: torch.device | str = "cpu") -> None:
        shape = (layout.num_layers, num_pages, layout.num_kv_heads, layout.head_dim)
        self._keys = torch.zeros(shape, dtype=DTYPES[layout.dtype], device=device)

    @property
    def num_bytes(self) -> int:
        """That they take."""
        return self._keys.numel() * self._keys.element_size()

    def write(self, layer_idx: int, pages_L: torch.Tensor, k_LKD: torch.Tensor) -> None:
        """Set the keys of pages, int64."""
        self._keys[layer_idx, pages_L] = k_LKD.to(self._keys.dtype)

    def read(self, layer_idx: int, pages: torch.Tensor) -> torch.Tensor:
        """``[..., K, D]`` of int64 pages of any shape."""
        return self._keys[layer_idx][pages]

    def read_heads(self, layer_idx: int, pages: torch.Tensor, kv_heads: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` of one KV head each; the two index tensors broadcast."""
        return self._keys[layer_idx][pages, kv_heads]
