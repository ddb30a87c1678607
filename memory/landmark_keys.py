"""The keys of landmarks, by page and layer: what stays near the compute, whatever tier the blocks themselves are in.

They lie in the pages (``PagePool.landmarks``), or where pages do not stay near, in a table beside them. A page that is
given to another block gets that block's landmark once it is full, and its key is not read before.

Shape legend: L landmarks, K KV heads, D head dim.
"""

import torch

from memory.layout import KVLayout
from memory.pages import DTYPES


class LandmarkKeys:
    """Keys of pages.

    Args:
        keys: ``[num_layers, num_pages, K, D]``, near the compute.
    """

    def __init__(self, keys: torch.Tensor) -> None:
        self._keys = keys

    def write(self, layer_idx: int, pages_L: torch.Tensor, k_LKD: torch.Tensor) -> None:
        """Set the keys of pages, int64."""
        self._keys[layer_idx, pages_L] = k_LKD.to(self._keys.dtype)

    def read(self, layer_idx: int, pages: torch.Tensor) -> torch.Tensor:
        """``[..., K, D]`` of int64 pages of any shape."""
        return self._keys[layer_idx][pages]

    def read_heads(self, layer_idx: int, pages: torch.Tensor, kv_heads: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` of one KV head each; the two index tensors broadcast."""
        return self._keys[layer_idx][pages, kv_heads]


def make_landmark_table(layout: KVLayout, num_pages: int, device: torch.device) -> LandmarkKeys:
    """A table beside pages that do not stay near."""
    shape = (layout.num_layers, num_pages, layout.num_kv_heads, layout.head_dim)
    return LandmarkKeys(torch.zeros(shape, dtype=DTYPES[layout.dtype], device=device))
