"""Rows of KV out of pages and into them, whatever order the pages have.

A row is one token's keys or values in one layer. Pages of every order are viewed as ``[num_pages, page_size, K, D]``,
with what the order pairs as one word (K) or as a dimension of its own (V). On a CPU, runs of whole pages are copied by
the page; everything else, and everything on a GPU, where looking at slots would wait for it, is copied by the row.
Shape legend: L rows, K KV heads, D head dim.
"""

import torch

from memory.pages import PagePool


def read_rows(
    pool: PagePool, layer_idx: int, slots_L: torch.Tensor, *, kv_heads: tuple[int, int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one layer at ``slots_L``; two contiguous ``[L, K, D]`` in the pool's dtype.

    Args:
        slots_L: int64 (int32), page * page_size + offset, on the pool's device, in any order.
        kv_heads: the first KV head to read and one after the last; None: all.
    """
    size, (first, stop) = pool.layout.page_size, kv_heads or (0, pool.layout.num_kv_heads)
    begin, end = _whole_pages(slots_L, size)
    rows = []
    for pages in _token_views(pool, layer_idx, first, stop):
        words = pages.new_empty((len(slots_L), stop - first, pages.shape[-1]))
        for part in (slice(0, begin), slice(end, len(slots_L))):
            if part.start < part.stop:
                words[part] = pages[_split_slots(slots_L[part], pages, size)]
        if begin < end:
            words[begin:end].view(-1, *pages.shape[1:]).copy_(pages[slots_L[begin:end:size] // size])
        rows.append(words.view(pool.views(layer_idx)[0].dtype))
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
        slots_L: int64 (int32), page * page_size + offset, on the pool's device, none twice.
    """
    size = pool.layout.page_size
    begin, end = _whole_pages(slots_L, size)
    views = _token_views(pool, layer_idx, first_kv_head, first_kv_head + k_LKD.shape[1])
    for pages, rows_LKD in zip(views, (k_LKD, v_LKD), strict=True):
        words = rows_LKD.to(pool.views(layer_idx)[0].dtype)
        if words.dtype != pages.dtype:
            words = words.contiguous().view(pages.dtype)
        for part in (slice(0, begin), slice(end, len(slots_L))):
            if part.start < part.stop:
                pages[_split_slots(slots_L[part], pages, size)] = words[part]
        if begin < end:
            pages[slots_L[begin:end:size] // size] = words[begin:end].unflatten(0, (-1, *pages.shape[1:-2]))


def _token_views(pool: PagePool, layer_idx: int, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of some heads as ``[num_pages, page_size, K, words]``; paired V has page_size as ``page_size / p, p``."""
    k_pages, v_pages = pool.views(layer_idx)
    if pool.layout.order == "nhd":
        return k_pages[:, :, first:stop], v_pages[:, :, first:stop]
    k_pages, v_pages = k_pages[:, first:stop], v_pages[:, first:stop]
    if pool.layout.order == "hnd":
        return k_pages.transpose(1, 2), v_pages.transpose(1, 2)
    return k_pages.view(torch.int32).squeeze(-1).permute(0, 3, 1, 2), v_pages.permute(0, 2, 4, 1, 3)


def _split_slots(slots_L: torch.Tensor, pages: torch.Tensor, page_size: int) -> tuple[torch.Tensor, ...]:
    """The indices of a row in the leading dimensions of ``pages``."""
    page, offset = slots_L // page_size, slots_L % page_size
    if pages.dim() == 4:
        return page, offset
    return page, offset // pages.shape[2], offset % pages.shape[2]


def _whole_pages(slots_L: torch.Tensor, page_size: int) -> tuple[int, int]:
    """The rows from the first page border on, if they are whole pages, without a last part of one; (0, 0) if not."""
    if slots_L.device.type != "cpu" or len(slots_L) < 2 * page_size:
        return 0, 0
    begin = -int(slots_L[0]) % page_size
    end = begin + (len(slots_L) - begin) // page_size * page_size
    slots = slots_L[begin:end].view(-1, page_size)
    starts = slots[:, :1]
    if (starts % page_size).any() or not torch.equal(slots - starts, torch.arange(page_size).expand_as(slots)):
        return 0, 0
    return begin, end
