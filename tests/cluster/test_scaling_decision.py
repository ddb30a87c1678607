"""When pools grow and shrink: the pure decision, on paper and under random loads."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscale.config import AutoscaleConfig, DecodeScaling, PrefillScaling
from cluster.autoscale.decision import Demand, Latency, PoolLoad, decide

CONFIG = AutoscaleConfig(
    enabled=True,
    prefill=PrefillScaling(min_workers=1, max_workers=8),
    decode=DecodeScaling(min_workers=1, max_workers=8),
    interval_s=1.0,
    window_s=10.0,
    grow_after_s=5.0,
    shrink_after_s=20.0,
    cooldown_s=10.0,
    retry_s=10.0,
)


def tokens(total: float) -> tuple[Demand, ...]:
    """A worker may have a thousand."""
    return (Demand("pending prompt tokens", total, 1000.0),)


class Pool:
    """A pool that does what is decided: a worker that was started is there after ``start_s``, one that drains is gone
    after ``drain_s``."""

    def __init__(self, config=CONFIG, *, role="prefill", num_live=1, start_s=3.0, drain_s=2.0, fails=False):
        self.config, self.role, self.fails = config, role, fails
        self.start_s, self.drain_s = start_s, drain_s
        self.now, self.memory = 0.0, {}
        self.num_live, self.num_started, self.num_failed = num_live, 0, 0
        self.starting, self.draining, self.changes = [], [], []

    @property
    def size(self):
        return self.num_live + len(self.starting)

    def step(self, load_of, seconds=1):
        for _ in range(int(seconds)):
            self.now += 1.0
            done = [at for at in self.starting if at <= self.now]
            self.starting = [at for at in self.starting if at > self.now]
            self.draining = [at for at in self.draining if at > self.now]
            if self.fails:
                self.num_failed += len(done)
            else:
                self.num_live += len(done)
                self.num_started += len(done)
            load = replace(
                load_of(self),
                num_live=self.num_live,
                num_starting=len(self.starting),
                num_draining=len(self.draining),
                num_started=self.num_started,
                num_failed=self.num_failed,
            )
            changes, self.memory = decide({self.role: load}, self.config, self.memory, now=self.now)
            for change in changes:
                self.changes.append((self.now, change))
                if change.num_workers > 0:
                    self.starting += [self.now + self.start_s] * change.num_workers
                else:
                    assert change.num_workers == -1
                    self.num_live -= 1
                    self.draining.append(self.now + self.drain_s)
        return self

    def numbers(self):
        return [change.num_workers for _, change in self.changes]


def constant(total, num_jobs=0):
    return lambda pool: PoolLoad(0, num_jobs=num_jobs, demands=tokens(total))


def test_a_queue_that_lasts_makes_it_grow_to_what_it_takes():
    pool = Pool().step(constant(3500.0), 200)
    assert (pool.num_live, pool.numbers()) == (4, [1, 1, 1])
    first, reason = pool.changes[0][0], pool.changes[0][1].reason
    assert first == 6.0  # five seconds after it was first seen
    assert reason == "3,500 pending prompt tokens for 1 workers of 1,000 each, for 5 s"


def test_several_at_a_time():
    config = replace(CONFIG, max_step=3)
    pool = Pool(config).step(constant(2500.0), 100)
    assert pool.numbers() == [2]
    assert Pool(config).step(constant(99_000.0), 100).numbers() == [3, 3, 1]


def test_a_short_queue_changes_nothing():
    pool = Pool()
    for _ in range(20):
        pool.step(constant(9000.0), 4).step(constant(0.0), 1)
    assert pool.changes == []


def test_it_shrinks_once_the_rest_can_carry_the_load():
    pool = Pool(num_live=4).step(constant(1600.0), 300)
    assert pool.changes == []  # three would be more than half full
    pool.step(constant(1400.0), 300)
    assert (pool.num_live, pool.numbers()) == (3, [-1])
    pool.step(constant(0.0), 300)
    assert (pool.num_live, pool.numbers()) == (1, [-1, -1, -1])
    assert "1 workers would be 0% busy, for 20 s" in pool.changes[-1][1].reason


def test_a_pending_start_counts():
    """Loading takes minutes: nothing more is started meanwhile for what one more worker will do."""
    pool = Pool(start_s=500.0).step(constant(1500.0), 400)
    assert pool.numbers() == [1]
    slow = lambda pool: PoolLoad(0, num_jobs=9, latencies=(Latency("TTFT p90", 3.0, 1.0),))  # noqa: E731
    assert Pool(start_s=500.0).step(slow, 400).numbers() == [1]


def test_nothing_shrinks_while_a_worker_comes_or_goes():
    pool = Pool(num_live=3, drain_s=500.0).step(constant(0.0), 400)
    assert pool.numbers() == [-1]


def test_a_failed_start_backs_off():
    pool = Pool(fails=True).step(constant(9000.0), 1200)
    starts = [at for at, _ in pool.changes]
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    assert gaps[:5] == sorted(gaps[:5])
    assert gaps[-1] >= 10.0 * 2**5
    assert 5 <= len(starts) <= 12
    pool.fails = False
    pool.step(constant(9000.0), 2000)
    assert pool.num_live == 8


def test_fewer_than_the_minimum_are_replaced_at_once():
    config = replace(CONFIG, decode=DecodeScaling(min_workers=3, max_workers=3))
    pool = Pool(config, role="decode", num_live=1).step(constant(0.0), 1)
    assert pool.numbers() == [2]
    pool.step(constant(0.0), 30)
    assert (pool.num_live, pool.numbers()) == (3, [2])


def test_a_minimum_that_cannot_be_had_backs_off_too():
    config = replace(CONFIG, prefill=PrefillScaling(min_workers=2, max_workers=2))
    pool = Pool(config, fails=True).step(constant(0.0), 600)
    assert 3 <= len(pool.changes) <= 8


@pytest.mark.parametrize(("num_jobs", "expected"), [(1, []), (2, [1])])
def test_a_missed_target_counts_while_jobs_share_workers(num_jobs, expected):
    """One prompt at a time is as late with ten workers."""

    def load_of(pool):
        seconds = 2.0 * max(1.0, num_jobs / max(1, pool.num_live))
        return PoolLoad(0, num_jobs=num_jobs, latencies=(Latency("TTFT p90", seconds, 1.9),))

    pool = Pool().step(load_of, 60)
    assert pool.numbers() == expected
    if expected:
        assert pool.changes[0][1].reason == "TTFT p90 of 4 s is above 1.9 s, for 5 s"


def test_a_target_that_would_be_missed_keeps_a_pool():
    def load_of(pool):
        return PoolLoad(0, num_jobs=4, latencies=(Latency("TPOT p90", 0.4 / pool.num_live, 0.15),))

    pool = Pool(num_live=5).step(load_of, 300)
    assert pool.num_live == 3  # two would take 0.2 s


def test_pools_are_apart():
    loads = {
        "prefill": PoolLoad(1, demands=tokens(5000.0)),
        "decode": PoolLoad(4, demands=(Demand("KV pages", 0.0, 85.0),)),
    }
    memory, seen = {}, []
    for now in range(40):
        changes, memory = decide(loads, CONFIG, memory, now=float(now))
        seen += [(change.role, change.num_workers) for change in changes]
    assert set(seen) == {("prefill", 1), ("decode", -1)}


def test_after_a_pause_nothing_has_lasted():
    """The endpoint did not answer for a while: what was seen before says nothing of the time between."""
    pool = Pool().step(constant(9000.0), 4)
    pool.now += 60.0
    pool.step(constant(9000.0), 4)
    assert pool.changes == []
    assert pool.step(constant(9000.0), 3).numbers() == [1]


LOADS = st.lists(
    st.tuples(
        st.floats(0.0, 20_000.0),
        st.integers(0, 20),
        st.floats(0.0, 5.0),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=20,
)
BOUNDS = st.tuples(st.integers(1, 4), st.integers(0, 5))


@settings(max_examples=150, deadline=None)
@given(phases=LOADS, bounds=BOUNDS, step=st.integers(1, 4), start_s=st.floats(0.5, 60.0), fails=st.booleans())
def test_never_beyond_its_bounds(phases, bounds, step, start_s, fails):
    """Whatever the load does, and however long starts take."""
    low, high = bounds[0], bounds[0] + bounds[1]
    config = replace(CONFIG, max_step=step, prefill=PrefillScaling(low, high))
    pool = Pool(config, num_live=low, start_s=start_s, fails=fails)
    for total, num_jobs, latency, seconds in phases:
        late = (Latency("TTFT p90", latency, 1.0),)
        for _ in range(seconds):
            pool.step(lambda _, t=total, n=num_jobs, late=late: PoolLoad(0, 0, 0, n, tokens(t), late))
            assert low <= pool.num_live
            assert pool.size <= high
    times = [at for at, _ in pool.changes]
    assert all(later - earlier >= CONFIG.cooldown_s for earlier, later in pairwise(times))


@settings(max_examples=150, deadline=None)
@given(
    total=st.floats(0.0, 12_000.0),
    num_jobs=st.integers(0, 12),
    alone_s=st.floats(0.01, 2.0),
    num_live=st.integers(1, 8),
    start_s=st.floats(0.5, 30.0),
)
def test_a_constant_load_finds_one_size(total, num_jobs, alone_s, num_live, start_s):
    """Grows, or shrinks, and then stays: jobs share the workers, and each is as late as it has others beside it."""

    def load_of(pool):
        seconds = alone_s * max(1.0, num_jobs / pool.num_live)
        return PoolLoad(0, 0, 0, num_jobs, tokens(total), (Latency("TTFT p90", seconds, 1.0),))

    pool = Pool(num_live=num_live, start_s=start_s).step(load_of, 600)
    numbers = pool.numbers()
    assert len({math.copysign(1, number) for number in numbers}) <= 1
    assert all(at < 500 for at, _ in pool.changes)
    if total > 1000.0 * pool.num_live:
        assert pool.num_live == CONFIG.prefill.max_workers
