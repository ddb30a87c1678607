"""The limit on requests at a time that follows what requests experience."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import ServeConfig, ServerConfig
from cluster.rate_limit import Places
from cluster.slo_limit import START, SloLimit
from longctx.config import compose
from longctx.errors import ConfigError


class Machine:
    """Serves so many requests at a time well, each further one makes all of them slower. No threads, no clock.

    Args:
        room: requests at a time that are served in half a second.
    """

    def __init__(self, room, **options):
        self.now = 0.0
        self.room = room
        self.server = ServerConfig(**({"max_requests": 64, "slo_ttft_s": 1.0, "slo_percentile": 90.0} | options))
        self.places = Places(self.server.max_requests, lambda: self.now)
        self.judged = Counter()
        self.slo = SloLimit(self.server, self.places, on_judged=self.judge, clock=lambda: self.now)
        self.rng = random.Random(0)

    def judge(self, target, has_kept):
        """Count."""
        self.judged[target, has_kept] += 1

    def serve(self, num_wanted):
        """As many of ``num_wanted`` requests as there are places for, all at once; the share that kept the target."""
        num = min(num_wanted, self.places.limit)
        self.places.take(num)
        if num < num_wanted:
            assert not self.places.has_room(1)
        started = self.now
        ttft_s = 0.5 * max(1.0, num / self.room)
        self.now += ttft_s + 0.1
        took = [ttft_s * self.rng.uniform(0.9, 1.1) for _ in range(num)]
        for seconds in took:
            self.slo.note_ttft(seconds, 100, started=started)
        self.places.give_back(num, is_end=False)
        return sum(seconds <= 1.0 for seconds in took) / num


def test_a_machine_with_room_is_filled_and_one_without_is_not():
    for room, expected in ((1000, 64), (10, 18), (1, 1)):
        machine = Machine(room)
        shares = [machine.serve(100) for _ in range(200)]
        assert machine.places.limit == pytest.approx(expected, abs=max(1, expected / 8))
        assert machine.judged.total() == sum(machine.judged["ttft", kept] for kept in (False, True)) > 200
        assert sum(shares[50:]) / 150 > 0.8  # at one place, each look at two misses for half of some requests


def test_nothing_grows_that_nobody_asks_for():
    machine = Machine(1000)
    for _ in range(100):
        machine.serve(4)
    assert machine.places.limit == START


def test_it_comes_back_from_a_bad_moment():
    machine = Machine(20)
    for _ in range(100):
        machine.serve(100)
    before = machine.places.limit
    machine.room = 2
    for _ in range(50):
        machine.serve(100)
    assert machine.places.limit <= 5
    machine.room = 20
    for _ in range(200):
        machine.serve(100)
    assert machine.places.limit == pytest.approx(before, abs=4)


def test_without_targets_the_limit_stays():
    machine = Machine(1, slo_ttft_s=None)
    machine.places.limit = 64
    for _ in range(100):
        machine.serve(100)
    assert machine.places.limit == 64


def test_long_prompts_and_requests_from_before_a_change_say_nothing():
    machine = Machine(10, slo_prompt_tokens=1000)
    for _ in range(100):
        machine.now += 1.0
        machine.slo.note_ttft(50.0, 1001, started=machine.now)
        machine.slo.note_ttft(50.0, 10, started=-1.0)
    assert machine.places.limit == START


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.001, 100.0), st.floats(0.0, 5.0), st.booleans()), max_size=200))
def test_the_limit_stays_in_its_bounds(events):
    machine = Machine(1, slo_tpot_s=0.1, max_requests=20)
    for seconds, passed, is_first in events:
        machine.now += passed
        if is_first:
            machine.slo.note_ttft(seconds, 1, started=machine.now - 1)
        else:
            machine.slo.note_tpot(seconds, started=machine.now - 1)
        machine.places.was_full = True
        assert 1 <= machine.places.limit <= 20


@pytest.mark.parametrize("override", ["server.slo_ttft_s=0", "server.slo_percentile=0", "server.slo_percentile=101"])
def test_targets_that_cannot_be_are_refused(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        compose(ServeConfig, "serve", ["model=demo", override])
