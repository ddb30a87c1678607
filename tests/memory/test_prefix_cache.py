"""The prefix cache against a plain dictionary of prefixes."""

import random

import numpy as np
import pytest

from memory.eviction import EVICTIONS
from memory.layout import KVLayout
from memory.pages import PagePool
from memory.prefix_cache import DigestChain, PrefixCache

PAGE_SIZE = 4


def make_cache(num_pages=16, **options):
    return PrefixCache(PagePool(KVLayout(1, 1, 4, PAGE_SIZE, "float32", "hnd"), num_pages), **options)


def digests_of(token_ids, salt=""):
    chain = DigestChain(PAGE_SIZE, salt)
    chain.extend(np.array(token_ids, dtype=np.int64))
    return chain.digests


def store(cache, token_ids, salt=""):
    """Allocate, fill and release the full pages of ``token_ids``; returns them."""
    digests = digests_of(token_ids, salt)
    pages = cache.pool.allocate(len(digests))
    cache.insert(digests, pages)
    cache.release(pages)
    return pages


def test_digests_name_the_whole_prefix():
    base = digests_of(range(12))
    assert len(base) == 3
    assert digests_of(range(14)) == base  # an incomplete page has none
    assert digests_of([99, *range(1, 12)])[2] != base[2]  # a later page knows the earlier tokens
    assert digests_of(range(12), "tenant")[0] != base[0]


def test_what_is_used_often_outlives_what_comes_once():
    """Pool of 16 pages: bursts of requests with one prefix of 4, between them more documents than the pool holds."""
    found = {}
    for eviction in EVICTIONS:
        cache, found[eviction] = make_cache(eviction=eviction), 0
        common = digests_of(range(16))
        for turn in range(30):
            if turn % 4 == 0:
                held = cache.match(common)
                found[eviction] += len(held)
                new = cache.pool.allocate(4 - len(held))
                cache.insert(common[len(held) :], new)
                cache.release([*held, *new])
                for _ in range(6):
                    cache.release(cache.match(common))
            store(cache, range(1000 * turn + 100, 1000 * turn + 120))
    assert found == {"lru": 0, "lfu": 4 * 7}


def test_what_was_popular_goes_in_the_end():
    cache = make_cache(num_pages=4, eviction="lfu")
    store(cache, range(8))
    for _ in range(5):
        cache.release(cache.match(digests_of(range(8))))
    for turn in range(1, 40):
        store(cache, range(1000 * turn, 1000 * turn + 8))
        if not cache.count(digests_of(range(8))):
            assert turn >= 5
            return
    pytest.fail("it stays for ever")


@pytest.mark.parametrize("split", [1, 4, 5, 8, 11])
def test_a_chain_can_grow_in_parts(split):
    tokens = np.arange(50, 63, dtype=np.int64)
    chain = DigestChain(PAGE_SIZE)
    chain.extend(tokens[:split])
    fork = chain.fork()
    fork.extend(tokens[fork.num_tokens :])
    assert fork.digests == digests_of(tokens)
    assert len(chain.digests) == split // PAGE_SIZE


def test_a_released_prefix_is_found_again():
    cache = make_cache()
    pages = store(cache, range(12))
    assert cache.num_idle == 3 and cache.num_used == 0
    assert cache.count(digests_of([*range(8), 1, 2, 3, 4])) == 2
    found = cache.match(digests_of([*range(8), 1, 2, 3, 4]))
    assert found == pages[:2]
    assert cache.num_used == 2 and cache.num_idle == 1
    cache.release(found)
    assert cache.num_used == 0


def test_salts_do_not_share():
    cache = make_cache()
    store(cache, range(12), "a")
    assert cache.match(digests_of(range(12), "b")) == []
    assert len(cache.match(digests_of(range(12), "a"))) == 3


def test_eviction_takes_the_oldest_and_a_prefix_loses_its_tail_first():
    cache = make_cache(num_pages=6)
    old, new = store(cache, range(12)), store(cache, range(100, 112))
    assert cache.pool.num_free == 0
    taken = cache.pool.allocate(2)
    assert taken is not None and set(taken) == {old[1], old[2]}
    assert cache.match(digests_of(range(12))) == old[:1]
    assert cache.match(digests_of(range(100, 112))) == new


def test_held_pages_are_never_evicted():
    cache = make_cache(num_pages=4)
    store(cache, range(12))
    held = cache.match(digests_of(range(12)))
    assert cache.pool.allocate(2) is None
    assert cache.pool.allocate(1) is not None
    cache.release(held)
    assert cache.pool.allocate(2) is not None


def test_disabled_remembers_nothing():
    cache = make_cache(enabled=False)
    store(cache, range(12))
    assert cache.match(digests_of(range(12))) == [] and cache.pool.num_free == 16


def test_clear_forgets_but_leaves_held_pages_alone():
    cache = make_cache()
    store(cache, range(12))
    held = cache.match(digests_of(range(4)))
    cache.clear()
    assert cache.num_used == 1 and cache.num_idle == 0 and cache.match(digests_of(range(12))) == []
    cache.release(held)
    assert cache.pool.num_free == 16


@pytest.mark.parametrize("eviction", list(EVICTIONS))
@pytest.mark.parametrize("seed", range(5))
def test_random_use_never_gives_pages_of_other_tokens(seed, eviction):
    """Every page carries the prefix it was filled for; whatever match returns must carry the prefix asked for."""
    rng, cache = random.Random(seed), make_cache(num_pages=12, eviction=eviction)
    content, held = {}, []
    for _ in range(1500):
        if held and rng.random() < 0.45:
            cache.release(held.pop(rng.randrange(len(held))))
            continue
        tokens = [rng.randrange(2) for _ in range(PAGE_SIZE * rng.randrange(1, 4))]
        digests = digests_of(tokens)
        shared = cache.match(digests)
        for idx, page in enumerate(shared):
            assert content[page] == tokens[: (idx + 1) * PAGE_SIZE]
        fresh = cache.pool.allocate(len(digests) - len(shared))
        if fresh is None:
            cache.release(shared)
        else:
            for idx, page in enumerate(fresh, start=len(shared)):
                assert all(page not in pages for pages in held)
                content[page] = tokens[: (idx + 1) * PAGE_SIZE]
            cache.insert(digests[len(shared) :], fresh)
            held.append(shared + fresh)
        in_use = {page for pages in held for page in pages}
        assert cache.num_used == len(in_use)
        assert cache.num_used + cache.num_idle + cache.pool.num_free == 12
