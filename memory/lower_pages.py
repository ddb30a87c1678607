"""Full pages that nothing writes any more, below the compute: in host memory or a memory-mapped file.

They are numbered on their own, counted as pages of a pool are, and read by the layer.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from memory.block_store import BlockStore
from memory.layout import KVLayout
from memory.pages import PageAllocator, PagePool


class LowerPages(PageAllocator):
    """Pages below a pool.

    Args:
        layout: of a page of the pool.
        store: where they lie.
    """

    def __init__(self, layout: KVLayout, store: BlockStore) -> None:
        super().__init__(layout, store.pool.num_pages)
        self._store = store
        self._free = list(range(self.num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def keep(self, pool: PagePool, pages: list[int], kept: list[int]) -> None:
        """Copy ``pages`` of ``pool``, all layers, to the pages ``kept`` of this."""
        blocks = pool.storage[:, torch.tensor(pages, device=pool.storage.device)].cpu()
        for layer_idx, blocks_PX in enumerate(blocks):
            self._store.write(layer_idx, torch.tensor(kept), blocks_PX)

    def read(self, layer_idx: int, pages: list[int], device: torch.device) -> PagePool:
        """A copy of one layer of some pages, as the pages ``0, 1, ...`` of a pool with that layer alone."""
        blocks = self._store.read(layer_idx, torch.tensor(pages)).to(device)
        return PagePool(replace(self.layout, num_layers=1), len(pages), storage=blocks[None])

    def copy_page(self, source: int, target: int) -> None:
        raise AssertionError("a page below is full: it is shared, never copied")

    def _take(self, num_pages: int, beside: Sequence[int]) -> list[int]:
        return [self._free.pop() for _ in range(num_pages)]

    def _give_back(self, pages: list[int]) -> None:
        self._free.extend(pages)
