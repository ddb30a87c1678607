"""Ranks that hold the same pages: what one did between two steps is repeated by the other, and what only one has got
is handed over."""

import random

import pytest
import torch

from memory.block_store import BlockStore, FilePool
from memory.layout import KVLayout
from memory.lower_pages import LowerPages
from memory.page_moves import PageMoves
from memory.pages import PagePool
from memory.same_pages import SamePages

LAYOUT = KVLayout(2, 1, 8, 4, "float32", "hnd")
NUM_NEAR, NUM_BELOW = 8, 6


def make_rank(kind):
    near = PagePool(LAYOUT, NUM_NEAR)
    store = FilePool(LAYOUT, NUM_BELOW) if kind == "file" else PagePool(LAYOUT, NUM_BELOW)
    return near, LowerPages(near, BlockStore(store))


def read_all(near, below, pages):
    return [SamePages(near, below).read(layer_idx, sorted(pages)) for layer_idx in range(LAYOUT.num_layers)]


@pytest.mark.parametrize("kind", ["host", "file"])
def test_what_is_held_is_alike_after_any_moves(kind):
    """Pages that are kept below, copied to and from, freed and filled from elsewhere, in any order between steps."""
    rng = random.Random(3)
    (near, below), (other_near, other_below) = make_rank(kind), make_rank(kind)
    moves, other = PageMoves(), SamePages(other_near, other_below)
    near.moves = moves
    held = []
    for _ in range(60):
        for _ in range(rng.randint(0, 12)):
            choice = rng.random()
            nears = [page for page in held if page < NUM_NEAR]
            if choice < 0.25 and nears and below.num_free:
                kept = below.allocate(1)
                below.keep([rng.choice(nears)], kept)
                held += kept
            elif choice < 0.5 and nears and near.num_free:
                source = rng.choice(nears)
                copy = near.allocate(1)
                near.copy_page(source, copy[0])
                held += copy
            elif choice < 0.7 and near.num_free and below.num_free:
                arrived = near.allocate(1) + below.allocate(1)
                for layer_idx in range(LAYOUT.num_layers):
                    blocks = torch.randint(256, (2, LAYOUT.block_bytes), dtype=torch.uint8)
                    SamePages(near, below).write(layer_idx, arrived, blocks)
                below.note_arrived(arrived, 0)
                held += arrived
            elif held:
                page = held.pop(rng.randrange(len(held)))
                owner = near if page < NUM_NEAR else below
                owner.reclaim(owner.release([page]))
        copies, arrived = moves.take()
        assert set(arrived) <= set(held)
        other.repeat(copies)
        for layer_idx in range(LAYOUT.num_layers):
            other.write(layer_idx, arrived, SamePages(near, below).read(layer_idx, arrived))
        for own, theirs in zip(read_all(near, below, held), read_all(other_near, other_below, held), strict=True):
            assert torch.equal(own, theirs)
        for page in held:  # a step computes the same everywhere
            if page < NUM_NEAR:
                blocks = torch.randint(256, (LAYOUT.num_layers, LAYOUT.block_bytes), dtype=torch.uint8)
                near.storage[:, page] = other_near.storage[:, page] = blocks


def test_a_copy_of_what_arrived_is_handed_over_when_the_original_is_gone():
    moves = PageMoves()
    moves.arrive([3])
    moves.copy(3, 5)
    moves.copy(1, 2)
    moves.forget([3])
    assert moves.take() == (((3, 5), (1, 2)), (5,))
    assert moves.take() == ((), ())


@pytest.mark.parametrize("kind", ["host", "file"])
def test_what_travels_has_a_place_below(kind):
    """Of a pool that is part of the store, and of one that is not."""
    make = FilePool if kind == "file" else PagePool
    store = make(LAYOUT, NUM_NEAR + NUM_BELOW)
    near = PagePool(LAYOUT, NUM_NEAR, storage=store.storage[:, :NUM_NEAR] if kind == "host" else None)
    below = LowerPages(near, BlockStore(store), ships=True)
    assert below.num_pages == below.num_free == NUM_BELOW
    near.storage.random_(256)
    kept = below.allocate(2)
    assert min(kept) >= NUM_NEAR
    below.keep([1, 4], kept)
    for layer_idx in range(LAYOUT.num_layers):
        below.note_final(layer_idx, [2, *kept])
        assert torch.equal(store.storage[layer_idx, [2, *kept]], near.storage[layer_idx, [2, 1, 4]])
    store.storage[:, [5, kept[0]]] = 7
    below.note_arrived([5, kept[0]], 0)
    assert (near.storage[:, 5] == 7).all() and not (near.storage[:, 2] == 7).all()
    assert (below.read(1, kept, near.storage.device).storage[0, 0] == 7).all()
