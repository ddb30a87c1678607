"""Pages' blocks as one tensor on the pool's device, and checksums that are made where the blocks are.

In host memory a checksum is that of frames (xxh3). On a GPU it is a sum of the 8-byte words, each times an odd number
of its own, modulo 2^64: words that are altered, lost or in another order change it.
"""

from collections.abc import Callable, Sequence

import torch

from memory.frames import checksum
from memory.pages import PagePool
from memory.staging import HostBlocks

_WORD = 8  # bytes


class TensorBlocks:
    """Copies between pages and one buffer that every call uses again. One object belongs to one thread."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._device = pool.storage.device
        self._host = None if pool.storage.is_cuda else HostBlocks(pool)  # torch's threads would get in the engine's way
        self._stream = torch.cuda.Stream(self._device) if pool.storage.is_cuda else None
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._device)

    def buffer(self, num_pages: int) -> torch.Tensor:
        """uint8 ``[num_pages * block_bytes]`` on the pool's device, until the next call."""
        size = num_pages * self._pool.layout.block_bytes
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._buffer[:size]

    def gather(self, layer_idx: int, pages: Sequence[int], ready: torch.cuda.Event | None) -> torch.Tensor:
        """One layer of ``pages`` in the buffer, once ``ready`` (the layer's computation) has happened."""
        buffer = self.buffer(len(pages))
        if self._host is not None:
            rest = buffer.numpy().data
            for piece in self._host.gather(layer_idx, pages):
                rest[: len(piece)] = piece
                rest = rest[len(piece) :]
            return buffer
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            rows = torch.as_tensor(pages, dtype=torch.long, device=self._device)
            torch.index_select(self._pool.storage[layer_idx], 0, rows, out=buffer.view(len(pages), -1))
        self._stream.synchronize()
        return buffer

    def scatter(self, layer_idx: int, pages: Sequence[int], blocks: torch.Tensor) -> None:
        """Write ``blocks`` to the pages; they hold it when this returns."""
        if self._host is not None:
            rest = blocks.numpy().data
            for target in self._host.targets(layer_idx, pages):
                target[:] = rest[: len(target)]
                rest = rest[len(target) :]
            return
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            rows = torch.as_tensor(pages, dtype=torch.long, device=self._device)
            self._pool.storage[layer_idx].index_copy_(0, rows, blocks.view(len(pages), -1))
        self._stream.synchronize()


def digest(blocks: torch.Tensor) -> int:
    """The checksum of uint8 ``[num_bytes]``, made on its device."""
    return word_sum(blocks) if blocks.is_cuda else checksum([blocks.numpy().data])


def word_sum(blocks: torch.Tensor) -> int:
    """The checksum that GPUs make; see the module's docstring."""
    padded = torch.nn.functional.pad(blocks, (0, -len(blocks) % _WORD))
    words = padded.view(torch.int64)
    factors = torch.arange(len(words), device=blocks.device).mul_(2).add_(1)
    return int((words * factors).sum()) & (1 << 64) - 1


def digest_pages(pool: PagePool) -> Callable[[int, Sequence[int], torch.cuda.Event | None], int]:
    """What makes ``digest`` of one layer of pages; host pages are not copied for it. For one thread."""
    if pool.storage.is_cuda:
        blocks = TensorBlocks(pool)
        return lambda layer_idx, pages, ready: digest(blocks.gather(layer_idx, pages, ready))
    views = HostBlocks(pool)
    return lambda layer_idx, pages, ready: checksum(views.gather(layer_idx, pages))
