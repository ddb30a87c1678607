"""Rows of KV out of pages and into them, whatever order the pages have.

A row is one token's keys or values in one layer. Pages of every order are viewed as ``[num_pages, page_size, K, D]``,
with what the order pairs as one word (K) or as a dimension of its own (V). On a CPU, whole pages are copied by runs of
consecutive ones where their values are neighbours in both places; everything else, and everything on a GPU, where
looking at slots would wait for it, is copied by the row.
Shape legend: L rows, K KV heads, D head dim.
"""

from collections.abc import Iterator

import torch

from memory.pages import DTYPES, PagePool


def read_rows(
    pool: PagePool, layer_idx: int, slots_L: torch.Tensor, *, kv_heads: tuple[int, int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one layer at ``slots_L``; two contiguous ``[L, K, D]`` in the pool's dtype.

    Args:
        slots_L: int64, page * page_size + offset, on the pool's device, in any order.
        kv_heads: the first KV head to read and one after the last; None: all.
    """
    places = _Places(slots_L, pool.layout.page_size)
    rows = []
    for pages in _token_views(pool, layer_idx, *(kv_heads or (0, pool.layout.num_kv_heads))):
        parts = list(places.parts(pages))
        if len(parts) == 1 and isinstance(parts[0][1], tuple):
            words_LKW = pages[parts[0][1]].contiguous()
        else:
            words_LKW = pages.new_empty((len(slots_L), *pages.shape[-2:]))
            for part, where in parts:
                found = pages[where]
                words_LKW[part].view(found.shape).copy_(found)
        rows.append(words_LKW.view(DTYPES[pool.layout.dtype]))
    return rows[0], rows[1]


def write_rows(
    pool: PagePool,
    layer_idx: int,
    slots_L: torch.Tensor,
    k_LKD: torch.Tensor,
    v_LKD: torch.Tensor,
    *,
    first_kv_head: int = 0,
) -> None:
    """Write ``[L, K, D]`` keys and values, cast to the pool's dtype, to ``slots_L`` of KV heads from a first one on.

    Args:
        slots_L: int64, page * page_size + offset, on the pool's device, none twice.
    """
    places = _Places(slots_L, pool.layout.page_size)
    views = _token_views(pool, layer_idx, first_kv_head, first_kv_head + k_LKD.shape[1])
    for pages, rows_LKD in zip(views, (k_LKD, v_LKD), strict=True):
        words_LKW = rows_LKD.to(DTYPES[pool.layout.dtype])
        if words_LKW.dtype != pages.dtype:
            words_LKW = words_LKW.contiguous().view(pages.dtype)
        for part, where in places.parts(pages):
            rows = words_LKW[part]
            pages[where] = rows.unflatten(0, (-1, *pages.shape[1:-2])) if isinstance(where, slice) else rows


def _token_views(pool: PagePool, layer_idx: int, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of some heads as ``[num_pages, page_size, K, W]``; paired V has page_size as ``page_size / p, p``."""
    k_pages, v_pages = pool.views(layer_idx)
    if pool.layout.order == "nhd":
        return k_pages[:, :, first:stop], v_pages[:, :, first:stop]
    k_pages, v_pages = k_pages[:, first:stop], v_pages[:, first:stop]
    if pool.layout.order == "hnd":
        return k_pages.transpose(1, 2), v_pages.transpose(1, 2)
    return k_pages.view(torch.int32).squeeze(-1).permute(0, 3, 1, 2), v_pages.permute(0, 2, 4, 1, 3)


class _Places:
    """Where rows lie in pages, and which of them are runs of whole pages."""

    def __init__(self, slots_L: torch.Tensor, page_size: int) -> None:
        self._page_L, self._offset_L = slots_L // page_size, slots_L % page_size
        self._page_size = page_size
        self._runs = self._find_runs() if slots_L.device.type == "cpu" and len(slots_L) >= 2 * page_size else []

    def parts(self, pages: torch.Tensor) -> Iterator[tuple[slice, slice | tuple[torch.Tensor, ...]]]:
        """Slices of the rows, each with the index of its place in one of ``_token_views``: a slice for whole pages."""
        begin = end = 0
        if self._runs and pages.stride(-1) == 1:
            begin, end = self._runs[0][0], self._runs[-1][0] + self._runs[-1][2] * self._page_size
            for row, page, count in self._runs:
                yield slice(row, row + count * self._page_size), slice(page, page + count)
        for part in (slice(0, begin), slice(end, len(self._page_L))):
            if part.start < part.stop:
                page_L, offset_L = self._page_L[part], self._offset_L[part]
                pair = pages.shape[2]
                yield part, (page_L, offset_L) if pages.dim() == 4 else (page_L, offset_L // pair, offset_L % pair)

    def _find_runs(self) -> list[tuple[int, int, int]]:
        """First row, first page and number of pages of each run; [] if rows are not whole pages between two parts."""
        size = self._page_size
        begin = -int(self._offset_L[0]) % size
        end = begin + (len(self._page_L) - begin) // size * size
        page, offset = (x[begin:end].view(-1, size) for x in (self._page_L, self._offset_L))
        if not torch.equal(offset, torch.arange(size).expand_as(offset)) or (page != page[:, :1]).any():
            return []
        runs: list[tuple[int, int, int]] = []
        for i, first in enumerate(page[:, 0].tolist()):
            if runs and runs[-1][1] + runs[-1][2] == first:
                runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
            else:
                runs.append((begin + i * size, first, 1))
        return runs
