"""Blocks below the compute: in host memory, or in a memory-mapped file.

A store has room for every page, numbered as its allocator numbers them, and lies in a pool: transports send from there
and write what arrives there, whatever is near. What is read is copied out at once.
"""

import mmap
import shutil
import tempfile
from pathlib import Path

import torch

from memory.layout import KVLayout
from memory.pages import PagePool

RESIDENT_BYTES = 512 << 10  # used of a map at one time; the kernel maps up to thirty times as much around them


class BlockStore:
    """Where blocks are that are not near.

    Args:
        pool: in host memory or a file; its pages are counted elsewhere.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool

    def write(self, layer_idx: int, pages_P: torch.Tensor, blocks_PX: torch.Tensor) -> None:
        """Keep one layer of some pages: uint8 ``[P, block_bytes]`` on the CPU."""
        put_blocks(self.pool.storage[layer_idx], pages_P, blocks_PX)
        self.pool.note_use(blocks_PX.numel())

    def read(self, layer_idx: int, pages_P: torch.Tensor) -> torch.Tensor:
        """One layer of some pages, uint8 ``[P, block_bytes]`` on the CPU; a copy."""
        found = torch.empty((len(pages_P), self.pool.layout.block_bytes), dtype=torch.uint8)
        num_blocks = max(1, RESIDENT_BYTES // self.pool.layout.block_bytes)
        for part, pages in zip(found.split(num_blocks), pages_P.split(num_blocks), strict=True):
            torch.index_select(self.pool.storage[layer_idx], 0, pages, out=part)
            self.pool.note_use(part.numel())
        return found


def put_blocks(storage_NX: torch.Tensor, places_P: torch.Tensor, blocks_PX: torch.Tensor) -> None:
    """Copy blocks to places of one layer of a pool, on whatever device that is."""
    if storage_NX.is_cuda:
        device = storage_NX.device
        storage_NX.index_copy_(0, places_P.to(device), blocks_PX.to(device))
    else:  # numpy copies rows of bytes, torch every byte by itself: 30 times slower
        storage_NX.numpy()[places_P.numpy()] = blocks_PX.numpy()


class FilePool(PagePool):
    """Pages in a memory-mapped file without a name, which is gone with the process.

    What was used of it is let go of every ``RESIDENT_BYTES``, so that a process does not grow with what it has read.
    Writing a page may wait for the disk.

    Args:
        layout: of the pages.
        num_pages: how many there are.
        folder: for the file; None: where temporary files go.

    Raises:
        ValueError: if ``folder`` is none, or has too little room.
    """

    def __init__(self, layout: KVLayout, num_pages: int, folder: Path | None = None) -> None:
        place = Path(tempfile.gettempdir()) if folder is None else folder
        if not place.is_dir():
            raise ValueError(f"{place} is no folder")
        size = num_pages * layout.page_bytes
        free = shutil.disk_usage(place).free
        if size > free:
            raise ValueError(f"{place} has {free / 2**30:.1f} GiB of room, and {size / 2**30:.1f} GiB are needed")
        with tempfile.TemporaryFile(dir=place) as file:
            file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        self._num_used = 0  # bytes, since the map was let go of; threads that count at once may lose some
        shape = (layout.num_layers, num_pages, layout.block_bytes)
        super().__init__(layout, num_pages, storage=torch.frombuffer(self._map, dtype=torch.uint8).view(shape))

    def note_use(self, num_bytes: int) -> None:
        """Let go of what was used; the file keeps it."""
        self._num_used += num_bytes
        if self._num_used > RESIDENT_BYTES:
            self._num_used = 0
            self._map.madvise(mmap.MADV_DONTNEED)
