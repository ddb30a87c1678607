"""Pools that grow and shrink over real workers and a real router: under load, when idle, and when something fails."""

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from cluster.autoscale.autoscaler import Autoscaler
from cluster.autoscale.board import PoolBoard
from cluster.autoscale.config import AutoscaleConfig, DecodeScaling, PrefillScaling
from cluster.autoscale.latency_window import LatencyWindow
from cluster.handle import LocalHandle
from cluster.serving_worker import ServingWorker
from tests.cluster.small_cluster import generate_alone, make_config, make_prompt, start_cluster, wait_until
from tests.longctx.engines import GREEDY, make_request
from tests.tiny_checkpoints import make_checkpoint

LONG = replace(GREEDY, max_tokens=100)
SCALING = AutoscaleConfig(
    enabled=True,
    interval_s=0.02,
    grow_after_s=0.1,
    shrink_after_s=0.2,
    cooldown_s=0.1,
    window_s=1.0,
    retry_s=0.5,
    decode=DecodeScaling(max_workers=3, max_waiting=0.5),
    prefill=PrefillScaling(max_workers=3, max_pending_tokens=300),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama", max_position_embeddings=8192)


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr("cluster.membership.ROSTER_INTERVAL_S", 0.05)
    monkeypatch.setattr("cluster.router.REJOIN_INTERVAL_S", 0.05)
    monkeypatch.setattr("cluster.autoscale.autoscaler.DRAIN_POLL_S", 0.02)


class LocalFleet:
    """Workers of this process; there is room for them once ``has_room`` is set."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.has_room = asyncio.Event()
        self.has_room.set()
        self.created, self.ended = [], []

    async def create(self, role):
        numbers = (number for number in range(99) if f"{role}-{number}" not in self.cluster.workers)
        name = f"{role}-{next(numbers)}"
        self.created.append(name)
        worker = ServingWorker(name, role, self.cluster.config)
        if self.has_room.is_set():
            self.cluster.workers[name], self.cluster.ranks[name] = worker, []
        return LocalHandle(worker)

    async def place(self, worker):
        await self.has_room.wait()

    async def find(self, name, role):
        return LocalHandle(self.cluster.workers[name])

    async def end(self, worker):
        self.ended.append(worker.name)
        ended = self.cluster.workers.pop(worker.name, None)
        if ended is not None:
            await ended.close()


@asynccontextmanager
async def start_scaled(config):
    """A cluster, its autoscaler's fleet, and that itself."""
    async with start_cluster(config) as cluster:

        async def roster():
            return [LocalHandle(worker) for worker in cluster.workers.values()]

        cluster.router._watch(roster)
        fleet, board = LocalFleet(cluster), PoolBoard(cluster.router, LatencyWindow())
        scaler = Autoscaler(config, fleet, board.exchange)
        scaler.board = board
        running = asyncio.create_task(scaler.run())
        try:
            yield cluster, fleet, scaler
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def scaled(folder, scaling=SCALING, **options):
    config = make_config(folder, **options)
    return replace(config, cluster=replace(config.cluster, autoscale=scaling))


def names(cluster, role):
    return sorted(name for name in cluster.workers if name.startswith(role))


@pytest.mark.parametrize(
    ("role", "options", "length"),
    [("decode", {"max_sequences": 2}, 40), ("prefill", {"max_batch_tokens": 16}, 600)],
)
def test_grows_under_load_and_shrinks_when_idle(folder, role, options, length):
    """Either pool alone; nobody's answer is another one."""
    config = scaled(folder, **options)
    sampling = LONG if role == "decode" else GREEDY
    requests = [make_request(f"r{n}", make_prompt(n, length), sampling) for n in range(8)]

    async def scenario():
        async with start_scaled(config) as (cluster, fleet, scaler):
            most = 0
            answers = [asyncio.create_task(cluster.answer(request)) for request in requests]
            while not all(answer.done() for answer in answers):
                most = max(most, len(names(cluster, role)))
                await asyncio.sleep(0.01)
            pools = {pool.role: pool for pool in scaler.report().pools}
            await wait_until(lambda: len(names(cluster, role)) == 1)
            await wait_until(lambda: len(cluster.router._peers) == 2)
            return [await answer for answer in answers], most, fleet, pools

    answers, most, fleet, pools = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert most > 1
    assert len(fleet.ended) == len(fleet.created)
    assert {name.rpartition("-")[0] for name in fleet.created} == {role}
    assert (pools[role].min_workers, pools[role].max_workers) == (1, 3)
    assert pools[role].num_grown > 0
    other = "decode" if role == "prefill" else "prefill"
    assert (pools[other].decision, pools[other].target_workers) == ("", 1)


def test_a_worker_without_room_is_shown_and_given_up(folder, caplog):
    caplog.set_level(logging.INFO)
    scaling = replace(SCALING, place_timeout_s=0.5, retry_s=60.0, decode=DecodeScaling(max_workers=2, max_waiting=0.5))
    config = scaled(folder, scaling, max_sequences=1)
    requests = [make_request(f"r{n}", make_prompt(n, 40), LONG) for n in range(6)]

    async def scenario():
        async with start_scaled(config) as (cluster, fleet, scaler):
            fleet.has_room.clear()
            answers = [asyncio.create_task(cluster.answer(request)) for request in requests]

            async def shown():
                return [pool for pool in scaler.board.describe(await cluster.router.worker_stats()) if pool.starts]

            await wait_until(shown)
            (pool,) = await shown()
            await wait_until(lambda: fleet.ended)
            await scaler.look()
            after = {pool.role: pool for pool in scaler.report().pools}["decode"]
            for answer in answers:
                await answer
            return pool, after, fleet

    pool, after, fleet = asyncio.run(scenario())
    assert (pool.role, [start.stage for start in pool.starts]) == ("decode", ["placing"])
    assert "requests without room" in pool.reason
    assert fleet.created == fleet.ended == ["decode-1"]  # the next is tried in a minute
    assert (after.num_failed, after.starts) == (1, ())
    assert 50 < after.retry_s <= 60
    assert "decode-1 is given up: it found no room in the Ray cluster in 0.5 s" in caplog.text
    assert "cluster.autoscale.place_timeout_s" in caplog.text


def test_a_worker_that_was_to_go_stays_if_it_is_needed(folder):
    """Load that comes back before a worker has drained is no reason to start another."""
    scaling = replace(SCALING, decode=DecodeScaling(max_workers=2, max_waiting=0.5))
    config = scaled(folder, scaling, num_decode=2, max_sequences=2)
    more = replace(GREEDY, max_tokens=500)
    requests = [make_request(f"r{n}", make_prompt(n, 40), more if n < 2 else LONG) for n in range(7)]

    async def scenario():
        async with start_scaled(config) as (cluster, fleet, _):
            answers = [asyncio.create_task(cluster.answer(request)) for request in requests[:2]]
            await wait_until(lambda: any(peer.is_draining for peer in cluster.router._peers))
            answers += [asyncio.create_task(cluster.answer(request)) for request in requests[2:]]
            await wait_until(lambda: not any(peer.is_draining for peer in cluster.router._peers))
            num_workers = len(names(cluster, "decode"))
            return [await answer for answer in answers], num_workers, fleet.created

    answers, num_workers, created = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert (num_workers, created) == (2, [])


def test_an_endpoint_that_does_not_answer_changes_nothing(folder, caplog):
    config = scaled(folder)

    async def scenario():
        async def exchange(report):
            raise TimeoutError

        scaler = Autoscaler(config, None, exchange)
        for _ in range(3):
            await scaler.look()

    asyncio.run(scenario())
    assert caplog.text.count("the endpoint does not answer (TimeoutError)") == 1


def test_a_lost_worker_that_does_not_come_back_is_replaced(folder, caplog):
    config = scaled(folder, replace(SCALING, place_timeout_s=0.3))

    async def scenario():
        async with start_scaled(config) as (cluster, fleet, _):
            await cluster.workers["decode-0"].close()
            await wait_until(lambda: fleet.created)
            await wait_until(lambda: cluster.router._peers.has_decode)
            return fleet.ended, await cluster.answer(make_request("r", make_prompt(1, 40)))

    ended, answer = asyncio.run(scenario())
    assert ended == ["decode-0"]
    assert [answer] == generate_alone(config, [make_request("r", make_prompt(1, 40))])
    assert "decode-0 has not come back in 0.3 s: it is given up" in caplog.text
