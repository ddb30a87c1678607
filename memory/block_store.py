"""Blocks below the compute: in host memory, or in a memory-mapped file.

A store has room for every page, numbered as its allocator numbers them. What is read is copied out at once; of a mapped
file no more stays resident than ``RESIDENT_BYTES``, so that a process does not grow with what it has read.
"""

import mmap
import shutil
import tempfile
from pathlib import Path
from typing import Protocol

import torch

from memory.layout import KVLayout

RESIDENT_BYTES = 32 << 20  # of the map


class BlockStore(Protocol):
    """Where blocks are that are not near."""

    def write(self, pages_P: torch.Tensor, blocks_LPX: torch.Tensor) -> None:
        """Keep all layers of some pages: uint8 ``[num_layers, P, block_bytes]`` on the CPU."""
        ...

    def read(self, layer_idx: int, pages_P: torch.Tensor) -> torch.Tensor:
        """One layer of some pages, uint8 ``[P, block_bytes]`` on the CPU; a copy."""
        ...

    def close(self) -> None:
        """Give the room back."""
        ...


class HostBlocks:
    """Host memory.

    Args:
        layout: of the pages.
        num_pages: how many there are.
        pinned: whether a GPU reads it.
    """

    def __init__(self, layout: KVLayout, num_pages: int, *, pinned: bool = False) -> None:
        shape = (layout.num_layers, num_pages, layout.block_bytes)
        self._blocks = torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned)

    def write(self, pages_P: torch.Tensor, blocks_LPX: torch.Tensor) -> None:
        self._blocks[:, pages_P] = blocks_LPX

    def read(self, layer_idx: int, pages_P: torch.Tensor) -> torch.Tensor:
        return self._blocks[layer_idx].index_select(0, pages_P)

    def close(self) -> None:
        self._blocks = self._blocks.new_empty(0)


class BlockFile:
    """A memory-mapped file without a name, which is gone with the process.

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
        shape = (layout.num_layers, num_pages, layout.block_bytes)
        self._blocks = torch.frombuffer(self._map, dtype=torch.uint8).view(shape)
        self._num_touched = 0

    def write(self, pages_P: torch.Tensor, blocks_LPX: torch.Tensor) -> None:
        self._blocks[:, pages_P] = blocks_LPX
        self._touch(blocks_LPX.numel())

    def read(self, layer_idx: int, pages_P: torch.Tensor) -> torch.Tensor:
        found = self._blocks[layer_idx].index_select(0, pages_P)
        self._touch(found.numel())
        return found

    def close(self) -> None:
        self._blocks = torch.empty(0, dtype=torch.uint8)
        self._map.close()

    def _touch(self, num_bytes: int) -> None:
        """Let go of what was touched; the file keeps it."""
        self._num_touched += num_bytes
        if self._num_touched > RESIDENT_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._num_touched = 0
