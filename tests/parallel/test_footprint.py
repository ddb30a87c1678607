"""Buffers of a rank's part of a plan, against counts by hand."""

import pytest

from parallel.footprint import count_buffers
from parallel.mask import Mask
from parallel.plan import make_problem
from parallel.planner import make_plan

ROWS, HEADS, KV_HEADS, DIM = 64, 4, 2, 8


def make(name, world_size, *, may_keep=True, causal=False):
    problem = make_problem(
        Mask(causal), ROWS * world_size, ROWS * world_size, (HEADS, KV_HEADS, DIM), world_size=world_size
    )
    from parallel.links import LinkModel

    return make_plan(name, problem, LinkModel(), backward=True, may_keep=may_keep)


KV_BYTES = 2 * ROWS * KV_HEADS * DIM * 4  # of one rank


def test_a_rank_alone_has_no_buffers():
    for is_backward in (False, True):
        assert count_buffers(make("kv_ring", 1), 0, backward=is_backward).peak == 0


def test_all_gather_holds_every_other_ranks_keys_and_a_packed_copy_for_each():
    footprint = count_buffers(make("all_gather", 4, may_keep=False), 0, backward=False)
    assert footprint.kept == 0
    assert footprint.peak == 3 * KV_BYTES + 3 * KV_BYTES


def test_a_ring_holds_what_it_computes_on_and_what_comes_next():
    footprint = count_buffers(make("kv_ring", 4, may_keep=False), 1, backward=False)
    assert footprint.peak == 3 * KV_BYTES  # one is there, the next arrives, the first is sent on


def test_what_is_kept_is_what_arrived():
    plan = make("kv_ring", 2)
    assert plan.keeps
    footprint = count_buffers(plan, 0, backward=False)
    assert footprint.kept == KV_BYTES
    backward = count_buffers(plan, 0, backward=True)
    # dK and dV go home in float32 and come home: K and V themselves do not travel again
    assert backward.peak == 2 * KV_BYTES


@pytest.mark.parametrize("name", ["token_ring", "kv_ring", "ulysses", "all_gather", "kv_two_way", "q_direct"])
def test_every_plan_has_bounded_buffers_in_both_directions(name):
    plan = make(name, 4, causal=True)
    for rank in range(4):
        for is_backward in (False, True):
            footprint = count_buffers(plan, rank, backward=is_backward)
            assert 0 < footprint.peak < 40 * KV_BYTES
            assert footprint.kept <= footprint.peak
