"""The KV page pool: fixed storage, page ids, reference counts.

Storage is one uint8 tensor ``[num_layers, num_pages, block_bytes]``: a run of consecutive pages of one layer is one
contiguous range of bytes, which is what a transport ships. Which sequence owns which page, and which pages can be found
again by their content, is not known here (``longctx/engine``, ``memory/prefix_cache.py``).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch

from memory.layout import KVLayout
from memory.page_moves import PageMoves

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALIGNMENT = 4096  # bytes: vector loads split no cache line, and shipping code may map what it ships


class PageAllocator(ABC):
    """Which pages are held, and how often; where their bytes are, subclasses know.

    Args:
        layout: what a page looks like.
        num_pages: how many there are.

    Not thread-safe: the engine's thread owns it.
    """

    def __init__(self, layout: KVLayout, num_pages: int) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.refcounts = [0] * num_pages
        self.evict: Callable[[int], int] | None = None  # frees up to n cached pages, returns how many

    @property
    @abstractmethod
    def num_free(self) -> int:
        """Pages nobody holds and no cache remembers."""

    @abstractmethod
    def copy_page(self, source: int, target: int) -> None:
        """Copy one page, all layers, before anything else is computed."""

    def note_final(self, layer_idx: int, pages: Sequence[int]) -> None:  # noqa: B027 - nothing to do for most
        """One layer of these pages is as it will stay, and will be sent to another worker."""

    def note_arrived(self, pages: Sequence[int], num_full: int) -> None:  # noqa: B027 - nothing to do for most
        """Pages hold what another worker sent; the first ``num_full`` are full, the others will be written to."""

    @abstractmethod
    def _take(self, num_pages: int, beside: Sequence[int]) -> list[int]:
        """So many free pages; there are enough."""

    @abstractmethod
    def _give_back(self, pages: list[int]) -> None:
        """Pages become free."""

    def allocate(self, num_pages: int, *, beside: Sequence[int] = ()) -> list[int] | None:
        """Page ids, each with reference count 1, or None (and nothing taken) if there are too few.

        Args:
            num_pages: how many; in the order of one sequence.
            beside: pages that these are to be copies of, one for each; they are put where a copy is cheap.
        """
        missing = num_pages - self.num_free
        if missing > 0 and self.evict is not None:
            self.evict(missing)
        if num_pages > self.num_free:
            return None
        taken = self._take(num_pages, beside)
        for page in taken:
            self.refcounts[page] = 1
        return taken

    def retain(self, pages: list[int]) -> None:
        """One more holder for each page."""
        for page in pages:
            self.refcounts[page] += 1

    def release(self, pages: list[int]) -> list[int]:
        """One holder less; returns the pages nobody holds any more, for the caller to ``reclaim`` or keep."""
        idle = []
        for page in pages:
            assert self.refcounts[page] > 0, f"page {page} released twice"
            self.refcounts[page] -= 1
            if self.refcounts[page] == 0:
                idle.append(page)
        return idle

    def reclaim(self, pages: list[int]) -> None:
        """Make idle pages free for allocation."""
        assert all(self.refcounts[page] == 0 for page in pages)
        self._give_back(pages)


class PagePool(PageAllocator):
    """Pages of KV under a fixed byte budget, in this process.

    Args:
        layout: what a page looks like.
        num_pages: how many there are.
        device: where the storage lives.
        storage: uint8 ``[num_layers, num_pages, block_bytes]`` to use instead of allocating (a shared-memory segment).

    Reading and writing pages from other threads than the allocating one is safe for pages that are allocated to them.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        *,
        device: torch.device | str = "cpu",
        storage: torch.Tensor | None = None,
    ) -> None:
        super().__init__(layout, num_pages)
        shape = (layout.num_layers, num_pages, layout.block_bytes)
        if storage is None:
            storage = _allocate(shape, torch.device(device))
        if storage.shape != shape or storage.dtype != torch.uint8:
            raise ValueError(f"storage is {storage.dtype} {tuple(storage.shape)}; must be uint8 {shape}")
        self.storage = storage
        self.moves: PageMoves | None = None  # for ranks that hold the same pages; None: there are none
        self._free = list(range(num_pages - 1, -1, -1))
        self._views = [_block_views(storage[layer_idx], layout) for layer_idx in range(layout.num_layers)]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def views(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, shaped as ``layout.order`` says, with a leading ``num_pages`` dimension; no copy."""
        return self._views[layer_idx]

    @property
    def landmarks(self) -> torch.Tensor:
        """Keys of pages' landmarks, ``[num_layers, num_pages, num_kv_heads, head_dim]``; no copy."""
        layout = self.layout
        assert layout.has_landmark
        keys = self.storage[..., 2 * layout.v_offset :].view(DTYPES[layout.dtype])
        return keys.unflatten(2, (layout.num_kv_heads, layout.head_dim))

    def block(self, layer_idx: int, page: int, count: int = 1) -> torch.Tensor:
        """uint8 ``[count * block_bytes]``: the bytes of ``count`` consecutive pages of one layer; no copy."""
        return self.storage[layer_idx, page : page + count].view(-1)

    def note_use(self, num_bytes: int) -> None:
        """So many bytes of pages are read or written outside the compute."""

    def read_page(self, page: int) -> torch.Tensor:
        """A copy of a page, uint8 ``[num_layers, block_bytes]`` on the CPU."""
        if self.storage.device.type == "cpu":
            return torch.from_numpy(self.storage.numpy()[:, page].copy())  # torch takes 40 times as long
        return self.storage[:, page].cpu().contiguous()

    def write_page(self, page: int, content_LX: torch.Tensor) -> None:
        """The inverse of ``read_page``."""
        if self.storage.device.type == "cpu":
            self.storage.numpy()[:, page] = content_LX.numpy()  # torch takes 60 times as long
        else:
            self.storage[:, page].copy_(content_LX)

    def copy_page(self, source: int, target: int) -> None:
        self.storage[:, target].copy_(self.storage[:, source])
        if self.moves is not None:
            self.moves.copy(source, target)

    def note_arrived(self, pages: Sequence[int], num_full: int) -> None:
        if self.moves is not None:
            self.moves.arrive(pages)

    def _take(self, num_pages: int, beside: Sequence[int]) -> list[int]:
        return [self._free.pop() for _ in range(num_pages)]

    def _give_back(self, pages: list[int]) -> None:
        self._free.extend(pages)
        if self.moves is not None:
            self.moves.forget(pages)


def _allocate(shape: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Zeroed bytes. On a CPU through numpy, whose zeros cost neither time nor memory until a page is written."""
    if device.type == "cpu":
        size = math.prod(shape)
        raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return torch.from_numpy(raw[start : start + size]).view(shape)
    return torch.zeros(shape, dtype=torch.uint8, device=device)


def _block_views(blocks: torch.Tensor, layout: KVLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V views of uint8 ``[num_pages, block_bytes]``."""
    heads, dim, size = layout.num_kv_heads, layout.head_dim, layout.page_size
    values = blocks.view(DTYPES[layout.dtype])  # [num_pages, 2 * heads * dim * size], and a landmark's
    if layout.order == "paired":
        pair = 4 // values.element_size()
        k_shape, v_shape = (heads, dim // pair, size, pair), (heads, size // pair, dim, pair)
    else:
        k_shape = v_shape = (heads, size, dim) if layout.order == "hnd" else (size, heads, dim)
    half = heads * dim * size
    return values[:, :half].unflatten(1, k_shape), values[:, half : 2 * half].unflatten(1, v_shape)
