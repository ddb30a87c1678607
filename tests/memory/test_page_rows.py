"""Rows read from pages and written to them, against the orders as memory/layout.py states them."""

import pytest
import torch

from memory.layout import ORDERS, KVLayout
from memory.page_rows import read_rows, write_rows
from memory.pages import DTYPES, PagePool

NUM_PAGES, KV_HEADS, DIM = 9, 3, 4


def make_pool(order, dtype, page_size):
    pool = PagePool(KVLayout(2, KV_HEADS, DIM, page_size, dtype, order), NUM_PAGES)
    for view in (*pool.views(0), *pool.views(1)):
        view.copy_(torch.randn(view.shape))
    return pool


def row_reference(pool, layer_idx, slot, head):
    """K and V of one token and head, value by value, from the text of memory/layout.py."""
    size, pair = pool.layout.page_size, 2 if pool.layout.dtype != "float32" else 1
    k, v = (pages[slot // size] for pages in pool.views(layer_idx))
    t = slot % size
    match pool.layout.order:
        case "hnd":
            return k[head, t], v[head, t]
        case "nhd":
            return k[t, head], v[t, head]
        case _:
            key = torch.stack([k[head, d // pair, t, d % pair] for d in range(DIM)])
            return key, torch.stack([v[head, t // pair, d, t % pair] for d in range(DIM)])


def slots_of(kind, page_size):
    pages = torch.tensor([5, 2, 3, 8, 0])  # 2 and 3 are a run
    slots = (pages[:, None] * page_size + torch.arange(page_size)).flatten()
    match kind:
        case "whole pages":
            return slots
        case "a sequence's middle":
            return slots[3:-5]
        case "backwards":
            return slots.flip(0)
        case "gap":  # everything up to one row looks like whole pages
            return torch.cat((slots[: page_size + 1], slots[page_size + 2 :]))
        case "shifted":  # consecutive slots across page borders
            return torch.arange(2, 2 + 4 * page_size)
        case "one":
            return slots[page_size + 1 : page_size + 2]
        case _:
            return slots[:0]


KINDS = ("whole pages", "a sequence's middle", "backwards", "gap", "shifted", "one", "none")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("page_size", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [None, (1, 3)])
def test_rows_read_are_those_in_the_pages(order, dtype, page_size, kind, kv_heads):
    torch.manual_seed(0)
    pool = make_pool(order, dtype, page_size)
    slots = slots_of(kind, page_size)
    k, v = read_rows(pool, 1, slots, kv_heads=kv_heads)
    first, stop = kv_heads or (0, KV_HEADS)
    assert k.shape == v.shape == (len(slots), stop - first, DIM)
    assert k.dtype == v.dtype == DTYPES[dtype] and k.is_contiguous() and v.is_contiguous()
    for row, slot in enumerate(slots.tolist()):
        for head in range(first, stop):
            want_k, want_v = row_reference(pool, 1, slot, head)
            assert torch.equal(k[row, head - first], want_k) and torch.equal(v[row, head - first], want_v)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(0, 3), (1, 2)])
@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16])
def test_rows_written_are_read_again_and_nothing_else_changes(order, dtype, kind, heads, row_dtype):
    torch.manual_seed(1)
    pool, page_size = make_pool(order, dtype, 8), 8
    before = pool.storage.clone()
    slots = slots_of(kind, page_size)
    first, stop = heads
    rows = torch.randn(2, len(slots), stop - first, 2 * DIM).to(row_dtype)[..., :DIM]  # not contiguous
    write_rows(pool, 0, slots, rows[0], rows[1], first_kv_head=first)
    for got, want in zip(read_rows(pool, 0, slots, kv_heads=heads), rows, strict=True):
        assert torch.equal(got, want.to(DTYPES[dtype]))
    old = PagePool(pool.layout, NUM_PAGES, storage=before)
    write_rows(pool, 0, slots, *read_rows(old, 0, slots, kv_heads=heads), first_kv_head=first)
    assert torch.equal(pool.storage, before)
