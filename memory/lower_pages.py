"""Full pages that nothing writes any more, below a pool: in host memory or a memory-mapped file.

They are counted as pages of a pool are, numbered behind the pool's own, and read by the layer. Where pages travel
between workers, the store has a place for the pool's pages too: what is sent is copied there, layer by layer as it is
final, and what arrives is written there, so that transports know one pool of one numbering. A pool whose storage is
that part of the store needs no copy.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from memory.block_store import BlockStore, put_blocks
from memory.pages import PageAllocator, PagePool


class LowerPages(PageAllocator):
    """Pages below a pool.

    Args:
        near: the pool.
        store: where they lie.
        ships: the store begins with a place for each page of ``near``.
    """

    def __init__(self, near: PagePool, store: BlockStore, *, ships: bool = False) -> None:
        first = near.num_pages
        super().__init__(near.layout, store.pool.num_pages - (first if ships else 0))
        self.refcounts = [0] * (first + self.num_pages)  # by number
        self.ships, self.below = ships, store.pool
        self._near, self._store = near, store
        self._num_before = 0 if ships else first  # numbers that the store has no place for
        self._is_mirror = ships and near.storage.data_ptr() != store.pool.storage.data_ptr()
        self._free = list(range(first + self.num_pages - 1, first - 1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def keep(self, pages: Sequence[int], kept: Sequence[int]) -> None:
        """Copy ``pages`` of the pool, all layers, to the pages ``kept`` of this."""
        blocks = self._near.storage[:, torch.tensor(pages, device=self._near.storage.device)].cpu()
        for layer_idx, blocks_PX in enumerate(blocks):
            self.write_blocks(layer_idx, kept, blocks_PX)
        if self._near.moves is not None:
            for source, target in zip(pages, kept, strict=True):
                self._near.moves.copy(source, target)

    def read(self, layer_idx: int, pages: Sequence[int], device: torch.device) -> PagePool:
        """A copy of one layer of some pages, as the pages ``0, 1, ...`` of a pool with that layer alone."""
        blocks = self.read_blocks(layer_idx, pages).to(device)
        return PagePool(replace(self.layout, num_layers=1), len(pages), storage=blocks[None])

    def read_blocks(self, layer_idx: int, pages: Sequence[int]) -> torch.Tensor:
        """A copy of one layer of some pages, uint8 ``[P, block_bytes]`` on the CPU."""
        return self._store.read(layer_idx, self._places(pages))

    def write_blocks(self, layer_idx: int, pages: Sequence[int], blocks_PX: torch.Tensor) -> None:
        """The inverse of ``read_blocks``."""
        self._store.write(layer_idx, self._places(pages), blocks_PX)

    def note_final(self, layer_idx: int, pages: Sequence[int]) -> None:
        """See the base class; those of the pool are sent from their places here."""
        near_P = torch.tensor([page for page in pages if page < self._near.num_pages], dtype=torch.int64)
        if self._is_mirror and len(near_P):
            storage = self._near.storage
            self._store.write(layer_idx, near_P, storage[layer_idx].index_select(0, near_P.to(storage.device)).cpu())

    def note_arrived(self, pages: Sequence[int], num_full: int) -> None:
        """See the base class; those of the pool are brought near."""
        near = torch.tensor([page for page in pages if page < self._near.num_pages], dtype=torch.int64)
        for layer_idx in range(self.layout.num_layers) if self._is_mirror else ():
            put_blocks(self._near.storage[layer_idx], near, self._store.read(layer_idx, near))
        self._near.note_arrived(pages, num_full)

    def copy_page(self, source: int, target: int) -> None:
        raise AssertionError("a page below is full: it is shared, never copied")

    def _places(self, pages: Sequence[int]) -> torch.Tensor:
        return torch.tensor(pages, dtype=torch.int64) - self._num_before

    def _take(self, num_pages: int, beside: Sequence[int]) -> list[int]:
        return [self._free.pop() for _ in range(num_pages)]

    def _give_back(self, pages: list[int]) -> None:
        self._free.extend(pages)
        if self._near.moves is not None:
            self._near.moves.forget(pages)
