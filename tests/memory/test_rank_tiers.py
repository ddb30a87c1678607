"""Frames of a rank's pages, which rank 0 allocates: what a page holds is never what its number held before."""

import pytest
import torch

from memory.block_store import BlockStore
from memory.layout import MIN_CACHE, KVLayout
from memory.pages import PagePool
from memory.rank_tiers import RankTiers

LAYOUT = KVLayout(2, 1, 4, 4, "float32", "hnd", has_landmark=True)
NUM_STAGING = 4


@pytest.fixture
def tiers():
    return RankTiers(LAYOUT, num_staging=NUM_STAGING, num_cached=MIN_CACHE, store=BlockStore(PagePool(LAYOUT, 40)))


def write(tiers, page, value):
    """A step that writes to ``page``, as attention does."""
    tiers.near.storage[:, tiers.staged(torch.tensor(page))] = value


def see(tiers, page):
    """What each layer sees of a page."""
    seen = []
    for layer_idx in range(LAYOUT.num_layers):
        for _, frames in tiers.look_at(layer_idx, torch.tensor([page])):
            seen.append(int(tiers.near.storage[layer_idx, frames[0], 0]))
        tiers.end_layer(layer_idx)
    return seen


def fill(tiers, page, value):
    tiers.begin_step([page], begun=[page], filled=[page])
    write(tiers, page, value)
    tiers.end_step()


def arrive(tiers, page, value, *, is_full):
    tiers.below.storage[:, page] = value
    tiers.note_arrived([page], int(is_full))


def test_full_pages_are_below_when_the_step_is_over(tiers):
    fill(tiers, 7, 3)
    assert (tiers.below.storage[:, 7, : 2 * LAYOUT.v_offset] == 3).all()
    assert see(tiers, 7) == [3, 3]
    assert len(tiers._free_frames) == NUM_STAGING


def test_pages_that_a_step_leaves_out_give_their_frames_up(tiers):
    for first in range(0, 40, NUM_STAGING):
        pages = list(range(first, first + NUM_STAGING))
        tiers.begin_step(pages, begun=pages, filled=[])
        tiers.end_step()
    assert len(tiers._free_frames) == 0
    tiers.begin_step([], begun=[], filled=[])
    assert len(tiers._free_frames) == NUM_STAGING


def test_a_number_that_is_used_again_is_another_page(tiers):
    """After each state that it may have been in: near by layer, being filled, arrived."""
    fill(tiers, 5, 1)
    assert see(tiers, 5) == [1, 1]
    fill(tiers, 5, 2)
    assert see(tiers, 5) == [2, 2]
    arrive(tiers, 5, 3, is_full=True)
    assert see(tiers, 5) == [3, 3]
    tiers.begin_step([5], begun=[5], filled=[])
    write(tiers, 5, 4)
    tiers.end_step()
    arrive(tiers, 5, 5, is_full=True)
    assert see(tiers, 5) == [5, 5]


@pytest.mark.parametrize("was_being_filled", [False, True])
def test_a_page_that_arrived_in_part_is_gone_on_with_and_copied(tiers, was_being_filled):
    """By a step, or before one by a fork."""
    if was_being_filled:
        tiers.begin_step([5], begun=[5], filled=[])
        write(tiers, 5, 4)
        tiers.end_step()
    arrive(tiers, 5, 6, is_full=False)
    tiers.copy_page(5, 9)
    tiers.begin_step([5, 9], begun=[], filled=[])
    frames = tiers.staged(torch.tensor([5, 9]))
    assert (tiers.near.storage[:, frames] == 6).all()
    tiers.end_step()
    arrive(tiers, 5, 7, is_full=False)
    tiers.begin_step([5], begun=[], filled=[])
    assert (tiers.near.storage[:, tiers.staged(torch.tensor(5))] == 7).all()
