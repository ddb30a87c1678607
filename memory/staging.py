"""Pages as buffers that sockets and copies take: the pages themselves in host memory, pinned copies of GPU pages.

One object belongs to one thread. The GPU variant copies on a stream of its own, so that shipping a layer overlaps
computing the next one.
"""

from collections.abc import Sequence

import torch

from memory.pages import PagePool


class HostBlocks:
    """Blocks of a pool in host memory, as views: nothing is copied."""

    def __init__(self, pool: PagePool) -> None:
        self._pool, self._layout = pool, pool.layout
        self._layer_bytes = pool.num_pages * pool.layout.block_bytes
        self._bytes = pool.storage.view(-1).numpy().data

    def gather(self, layer_idx: int, pages: Sequence[int], ready: torch.cuda.Event | None = None) -> list[memoryview]:
        """The bytes of one layer of ``pages`` in order, one view for each run of consecutive pages."""
        size = self._layout.block_bytes
        base = layer_idx * self._layer_bytes
        self._pool.note_use(len(pages) * size)
        views = []
        first = 0
        for idx in range(1, len(pages) + 1):
            if idx == len(pages) or pages[idx] != pages[idx - 1] + 1:
                start = base + pages[first] * size
                views.append(self._bytes[start : start + (idx - first) * size])
                first = idx
        return views

    def targets(self, layer_idx: int, pages: Sequence[int]) -> list[memoryview]:
        """Where to write the bytes of one layer of ``pages``."""
        return self.gather(layer_idx, pages)

    def settle(self, layer_idx: int, pages: Sequence[int]) -> None:
        """Nothing to do: ``targets`` are the pages."""


class DeviceBlocks:
    """Blocks of a pool in GPU memory, by way of one pinned buffer that every call uses again."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._stream = torch.cuda.Stream(pool.storage.device)
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def gather(self, layer_idx: int, pages: Sequence[int], ready: torch.cuda.Event | None = None) -> list[memoryview]:
        """The bytes of one layer of ``pages``, copied once ``ready`` (the layer's computation) has happened."""
        host = self._pinned(len(pages))
        with torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            for piece, page in zip(host.split(self._pool.layout.block_bytes), pages, strict=True):
                piece.copy_(self._pool.block(layer_idx, page), non_blocking=True)
        self._stream.synchronize()
        return [host.numpy().data]

    def targets(self, layer_idx: int, pages: Sequence[int]) -> list[memoryview]:
        """The pinned buffer, to be filled and handed over by ``settle``."""
        return [self._pinned(len(pages)).numpy().data]

    def settle(self, layer_idx: int, pages: Sequence[int]) -> None:
        """Copy the pinned buffer to the pages; they hold it when this returns."""
        host = self._pinned(len(pages))
        with torch.cuda.stream(self._stream):
            for piece, page in zip(host.split(self._pool.layout.block_bytes), pages, strict=True):
                self._pool.block(layer_idx, page).copy_(piece, non_blocking=True)
        self._stream.synchronize()

    def _pinned(self, num_pages: int) -> torch.Tensor:
        size = num_pages * self._pool.layout.block_bytes
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._buffer[:size]


Blocks = HostBlocks | DeviceBlocks


def make_blocks(pool: PagePool) -> Blocks:
    """Buffers of ``pool``'s pages, wherever they are."""
    return DeviceBlocks(pool) if pool.storage.is_cuda else HostBlocks(pool)
