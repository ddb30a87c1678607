"""The page pool: accounting, views over the raw bytes, copies."""

import random

import pytest
import torch

from memory.layout import ORDERS, KVLayout
from memory.pages import PagePool


def make_pool(num_pages=8, *, order="hnd", dtype="float32"):
    return PagePool(KVLayout(2, 3, 4, 8, dtype, order), num_pages)


def test_allocation_is_all_or_nothing():
    pool = make_pool(4)
    first = pool.allocate(3)
    assert first is not None and len(set(first)) == 3
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    pool.reclaim(pool.release(first))
    assert pool.num_free == 4


def test_a_shared_page_is_idle_only_after_its_last_holder():
    pool = make_pool()
    pages = pool.allocate(2)
    pool.retain(pages[:1])
    assert pool.release(pages) == pages[1:]
    assert pool.release(pages[:1]) == pages[:1]
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages[:1])


def test_random_allocations_never_share_or_lose_a_page():
    rng, pool, held = random.Random(0), make_pool(16), []
    for _ in range(2000):
        if held and rng.random() < 0.5:
            pool.reclaim(pool.release(held.pop(rng.randrange(len(held)))))
        elif (pages := pool.allocate(rng.randrange(5))) is not None:
            held.append(pages)
        taken = [page for pages in held for page in pages]
        assert len(taken) == len(set(taken)) == 16 - pool.num_free


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_views_cover_a_block_k_before_v(order, dtype):
    pool = make_pool(order=order, dtype=dtype)
    k, v = pool.views(1)
    k[5] = 1.0
    v[5] = 2.0
    block = pool.block(1, 5).view(k.dtype)
    half = len(block) // 2
    assert (block[:half] == 1.0).all() and (block[half:] == 2.0).all()
    assert pool.storage.count_nonzero() == pool.block(1, 5).count_nonzero()


def test_copy_page_copies_every_layer():
    pool = make_pool()
    pool.storage.random_(0, 255)
    pool.copy_page(2, 6)
    assert torch.equal(pool.storage[:, 2], pool.storage[:, 6])


def test_new_pages_are_zero_and_aligned():
    pool = make_pool()
    assert not pool.storage.any()
    assert pool.storage.data_ptr() % 64 == 0


def test_foreign_storage_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"storage is .* must be uint8"):
        PagePool(make_pool().layout, 8, storage=torch.zeros(2, 7, 10, dtype=torch.uint8))
