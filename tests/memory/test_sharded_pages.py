"""Pages over several ranks: dealt out in zigzag, copied where they lie, never lost."""

import random

import pytest

from memory.layout import KVLayout
from memory.prefix_cache import PrefixCache
from memory.sharded_pages import ShardedPages
from parallel.layout import make_layout

LAYOUT = KVLayout(2, 1, 16, 16, "float32", "hnd")


def make_pages(*, pages_per_rank=16, world_size=4, stretch_pages=16):
    return ShardedPages(LAYOUT, pages_per_rank, world_size=world_size, stretch_pages=stretch_pages)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_pages", [2, 5, 8, 13, 16])
def test_a_stretch_is_dealt_out_as_zigzag(world_size, num_pages):
    pages = make_pages(world_size=world_size)
    taken = pages.allocate(num_pages)
    expected = [-1] * num_pages
    for rank, spans in enumerate(make_layout("zigzag", num_pages, world_size)):
        for span in spans:
            for index in range(span.start, span.stop):
                expected[index] = rank
    assert [pages.rank_of(page) for page in taken] == expected


def test_a_long_prompt_is_dealt_out_stretch_by_stretch():
    taken = make_pages(stretch_pages=8).allocate(24)
    ranks = [page // 16 for page in taken]
    assert ranks == [0, 1, 2, 3, 3, 2, 1, 0] * 3


def test_single_pages_go_to_whoever_has_most():
    pages = make_pages()
    assert [pages.rank_of(pages.allocate(1)[0]) for _ in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_full_rank_is_helped_out_by_the_others():
    pages = make_pages(pages_per_rank=4, world_size=2, stretch_pages=8)
    first = pages.allocate(6)
    second = pages.allocate(2)
    assert sorted(first + second) == list(range(8))
    assert pages.allocate(1) is None


def test_copies_to_pages_that_are_given_up_are_not_made():
    """Whoever gets such a page next may have filled it before a step comes."""
    pages = make_pages(world_size=2)
    (source,) = pages.allocate(1)
    kept, dropped = pages.allocate(2, beside=[source, source])
    for target in (dropped, kept):
        pages.copy_page(source, target)
    pages.reclaim(pages.release([dropped]))
    assert pages.take_copies() == [(source, kept)]


def test_a_copy_lies_beside_its_original_or_is_refused():
    pages = make_pages(pages_per_rank=2, world_size=2, stretch_pages=4)
    whole = pages.allocate(3)  # ranks 0, 0 or 1, ...
    source = whole[0]
    copy = pages.allocate(1, beside=[source])
    if copy is None:
        assert all(pages.rank_of(page) == pages.rank_of(source) for page in whole[:2])
        pages.reclaim(pages.release([whole[1]]))
        copy = pages.allocate(1, beside=[source])
    assert pages.rank_of(copy[0]) == pages.rank_of(source)
    pages.copy_page(source, copy[0])
    assert pages.take_copies() == [(source, copy[0])]
    assert pages.take_copies() == []


def test_a_copy_evicts_what_is_idle_on_its_rank():
    pages = make_pages(pages_per_rank=2, world_size=2, stretch_pages=4)
    cache = PrefixCache(pages)
    held = pages.allocate(4)
    cache.insert([b"a", b"b", b"c", b"d"], held)
    source = held[0]
    cache.release(held[1:])
    copy = pages.allocate(1, beside=[source])
    assert pages.rank_of(copy[0]) == pages.rank_of(source)


def test_nothing_is_lost_or_given_twice():
    rng = random.Random(7)
    pages = make_pages(pages_per_rank=9, world_size=3, stretch_pages=6)
    held: list[list[int]] = []
    for _ in range(500):
        if held and rng.random() < 0.5:
            pages.reclaim(pages.release(held.pop(rng.randrange(len(held)))))
        else:
            wanted = rng.randint(1, 9)
            free = pages.num_free
            taken = pages.allocate(wanted)
            assert (taken is None) == (wanted > free)
            if taken is not None:
                held.append(taken)
        flat = [page for run in held for page in run]
        assert len(flat) == len(set(flat)) == 27 - pages.num_free
