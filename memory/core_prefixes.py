"""Prefixes under CCA attention in a folder, page by page: also what sequences no longer hold.

The file of a page of tokens has two parts: the page, and the cores (with bounds, where groups are fetched) of the
groups that ended in it. Both never change again, so a sequence can go on behind any page whose files, and those of all
before, are there: it reads the cores of all, and the tokens only of those that the coming token sees as they are. The
tokens of a group that has not ended are among these. What follows is bit for bit what it would have been.

Legend: N cores, L layers, S parts of an entry (1, or 2 with bounds), K KV heads, D head dim.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from memory.core_pages import CorePages, CoreSizes
from memory.lower_pages import LowerPages
from memory.page_rows import read_rows, write_rows
from memory.pages import DTYPES, PagePool
from memory.prefix_store import PrefixStore

_PAGE, _CORES = 0, 1  # parts of a file


@dataclass(slots=True)
class CoreSearch:
    """How far a sequence's prefix has been looked for."""

    num_found: int = 0  # first pages whose cores are loaded
    seconds: float = 0.0  # that it took
    loaded: set[int] = field(default_factory=set)  # pages, near and below, that hold something now
    is_over: bool = False


class CorePrefixes:
    """Saves and finds what sequences leave behind.

    Args:
        store: the folder.
        near: the pool.
        below: where passed pages are kept; None: nowhere.
        core_stride: as in ``CoreCapacity``.
    """

    def __init__(self, store: PrefixStore, near: PagePool, below: LowerPages | None, *, core_stride: int) -> None:
        self._store, self._near, self._below, self._stride = store, near, below, core_stride
        layout = near.layout
        self._page_size = layout.page_size
        self._entry_shape = (layout.num_layers, core_stride, 2, layout.num_kv_heads, layout.head_dim)
        self._entry_bytes = layout.num_layers * core_stride * 2 * layout.num_kv_heads * layout.row_bytes

    def save(self, digests: Sequence[bytes], first: int, cores: CorePages, pages: Sequence[int]) -> None:
        """Pages of tokens from the one numbered ``first`` on are complete; ``pages`` are all that the sequence has."""
        fresh = [(idx, digest) for idx, digest in enumerate(digests, start=first) if not self._store.knows(digest)]
        if not fresh:
            return
        start, stop = (cores.sizes.num_cores(idx * self._page_size) for idx in (fresh[0][0], fresh[-1][0] + 1))
        entries_NX = self._read_entries(cores, start, stop)
        for idx, digest in fresh:
            own = slice(*(cores.sizes.num_cores(each * self._page_size) - start for each in (idx, idx + 1)))
            if self._store.has_room(sum(self._sizes(cores.sizes, idx)), digest):
                content = self._near.read_page(pages[idx - cores.num_passed])
                self._store.put(digest, (content, entries_NX[own].clone()))

    def search(self, search: CoreSearch, digests: Sequence[bytes], cores: CorePages, *, max_bytes: int) -> None:
        """Load cores of the first pages of ``digests``, and what else is passed for good, a part at a time.

        Args:
            search: goes on; ``is_over`` once there are no more.
            digests: of all pages that may be found.
            cores: of a sequence of which nothing is computed, with all pages of its cores.
            max_bytes: about as much is loaded now.
        """
        begun, first, found, num_bytes = time.perf_counter(), search.num_found, [], 0
        while search.num_found < len(digests) and num_bytes < max_bytes:
            idx = search.num_found
            wanted = (_CORES, _PAGE) if idx < len(cores.kept) else (_CORES,)
            parts = self._store.get(digests[idx], self._sizes(cores.sizes, idx), wanted)
            if parts is None:
                search.is_over = True
                break
            found.append(parts[0])
            num_bytes += sum(map(len, parts))
            if len(parts) > 1:
                self._put_below(cores.kept[idx], parts[1])
                search.loaded.add(cores.kept[idx])
            search.num_found += 1
        if found:
            start = cores.sizes.num_cores(first * self._page_size)
            search.loaded.update(self._write_entries(cores, start, torch.cat(found)))
        search.is_over |= search.num_found == len(digests)
        search.seconds += time.perf_counter() - begun

    def finish(self, search: CoreSearch, digests: Sequence[bytes], cores: CorePages) -> list[int]:
        """Load the tokens that the one behind the found pages sees; the pages that hold them, which were spare.

        Of a page that turns out to be damaged nothing is used, nor of those behind it. ``cores`` and ``num_found`` are
        as if so many pages had been computed.
        """
        begun, size = time.perf_counter(), self._page_size
        missing = self._load_tokens(search.num_found, digests, cores)
        while missing is not None:
            search.num_found = missing
            missing = self._load_tokens(search.num_found, digests, cores)
        cores.num_passed = cores.sizes.first_token(search.num_found * size) // size
        pages = cores.spare[: search.num_found - cores.num_passed]
        del cores.spare[: len(pages)]
        if self._near.moves is not None and search.num_found:
            self._near.moves.arrive(search.loaded.union(pages))
        self._store.note_loaded(search.num_found, search.seconds + time.perf_counter() - begun)
        return pages

    def _load_tokens(self, num_found: int, digests: Sequence[bytes], cores: CorePages) -> int | None:
        """Fill spare pages with the last of so many; the number of one that is not there (any more)."""
        layout, first = self._near.layout, cores.sizes.first_token(num_found * self._page_size) // self._page_size
        for idx in range(first, num_found):
            parts = self._store.get(digests[idx], self._sizes(cores.sizes, idx), (_PAGE,))
            if parts is None:
                return idx
            self._near.write_page(cores.spare[idx - first], parts[0].view(layout.num_layers, layout.block_bytes))
        return None

    def _sizes(self, sizes: CoreSizes, page_idx: int) -> tuple[int, int]:
        """Bytes of both parts of a page's file."""
        start, stop = (sizes.num_cores(idx * self._page_size) for idx in (page_idx, page_idx + 1))
        return self._near.layout.page_bytes, (stop - start) * self._entry_bytes

    def _put_below(self, page: int, content: torch.Tensor) -> None:
        assert self._below is not None
        layout = self._near.layout
        for layer_idx, block_X in enumerate(content.view(layout.num_layers, layout.block_bytes)):
            self._below.write_blocks(layer_idx, [page], block_X[None])

    def _slots(self, cores: CorePages, start: int, stop: int, part: int) -> torch.Tensor:
        pages = torch.tensor(cores.cores[part :: self._stride], dtype=torch.int64)
        core_N = torch.arange(start, stop)
        slots_N = pages[core_N // self._page_size] * self._page_size + core_N % self._page_size
        return slots_N.to(self._near.storage.device)

    def _read_entries(self, cores: CorePages, start: int, stop: int) -> torch.Tensor:
        """Cores from one number to another as bytes ``[N, entry_bytes]``."""
        entries_NLSXKD = torch.empty((stop - start, *self._entry_shape), dtype=DTYPES[self._near.layout.dtype])
        for part in range(self._stride if stop > start else 0):
            slots_N = self._slots(cores, start, stop, part)
            for layer_idx in range(self._near.layout.num_layers):
                for side, rows_NKD in enumerate(read_rows(self._near, layer_idx, slots_N)):
                    entries_NLSXKD[:, layer_idx, part, side] = rows_NKD
        return entries_NLSXKD.flatten(1).view(torch.uint8)

    def _write_entries(self, cores: CorePages, start: int, content: torch.Tensor) -> list[int]:
        """Put cores from a number on where they belong; the pages that hold them."""
        if not len(content):
            return []
        entries_NLSXKD = content.view(DTYPES[self._near.layout.dtype]).view(-1, *self._entry_shape)
        entries_NLSXKD = entries_NLSXKD.to(self._near.storage.device)
        stop, pages = start + len(entries_NLSXKD), []
        for part in range(self._stride):
            slots_N = self._slots(cores, start, stop, part)
            pages += (slots_N // self._page_size).unique().tolist()
            for layer_idx in range(self._near.layout.num_layers):
                k_NKD, v_NKD = entries_NLSXKD[:, layer_idx, part].unbind(1)
                write_rows(self._near, layer_idx, slots_N, k_NKD, v_NKD)
        return pages
