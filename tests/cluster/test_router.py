"""Where requests go, what the router says of its workers, and what it does when a worker cannot be reached."""

import asyncio
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from cluster.config import ClusterConfig
from cluster.handle import LocalHandle
from cluster.openai_errors import to_api_error
from cluster.peer import WorkerPeer, make_flight
from cluster.serving import NotReadyError
from cluster.serving_worker import ServingWorker
from longctx.errors import WorkerLostError
from tests.cluster.small_cluster import (
    TRANSPORTS,
    generate_alone,
    join,
    make_config,
    make_prompt,
    start_cluster,
    wait_until,
)
from tests.cluster.worker_process import open_worker
from tests.longctx.engines import GREEDY, make_request
from tests.tiny_checkpoints import make_checkpoint

PAGE_BYTES = 8192


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama", max_position_embeddings=8192)


class CutHandle(LocalHandle):
    """A worker whose network can be cut: calls fail, and a poll is not answered before it heals."""

    def __init__(self, worker):
        super().__init__(worker)
        self.is_cut = False
        self.num_refused = 0
        self._healed = asyncio.Event()

    def heal(self):
        """Connect it again."""
        self.is_cut = False
        self._healed.set()

    async def call(self, method, /, *args):
        if self.is_cut and method == "poll":
            await self._healed.wait()
        if self.is_cut:
            self.num_refused += 1
            raise WorkerLostError(f"{self.name} cannot be reached")
        return await super().call(method, *args)


async def ready_workers(cluster):
    return [worker.name for worker in (await cluster.router.health()).workers if worker.ready]


def test_equal_requests_are_spread(folder):
    config = make_config(folder, num_prefill=3, num_decode=3)
    params = replace(GREEDY, max_tokens=150)  # none ends before the last has begun
    requests = [make_request(f"r{n}", make_prompt(n, 300), params) for n in range(6)]

    async def scenario():
        async with start_cluster(config) as cluster:
            answers = await asyncio.gather(*map(cluster.answer, requests))
            return answers, {name: (await cluster.stats(name)).num_generated_tokens for name in cluster.workers}

    answers, num_generated = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert [num_generated[f"decode-{idx}"] for idx in range(3)] == [2 * 149] * 3
    assert all(num_generated[f"prefill-{idx}"] for idx in range(3))


def test_a_prompt_goes_where_its_prefix_is(folder):
    config = make_config(folder, num_prefill=2, num_decode=2)
    documents = [make_prompt(seed, 320) for seed in range(2)]

    async def scenario():
        async with start_cluster(config) as cluster:
            firsts = [make_request(f"first{n}", document) for n, document in enumerate(documents)]
            await asyncio.gather(*map(cluster.answer, firsts))  # one to each worker
            cached, shipped = [], []
            for n in (1, 0, 1, 1, 0, 0):
                before = [cluster.num_shipped(f"prefill-{idx}") for idx in range(2)]
                deltas = await cluster.generate(make_request(f"next{len(cached)}", documents[n] + [len(cached)]))
                cached.append(max(delta.num_cached_tokens for delta in deltas))
                after = [cluster.num_shipped(f"prefill-{idx}") for idx in range(2)]
                shipped.append(sum(after) - sum(before))
            return cached, shipped

    cached, shipped = asyncio.run(scenario())
    assert cached == [320] * 6
    assert shipped == [PAGE_BYTES] * 6


def test_a_full_decode_worker_is_passed_over(folder):
    """decode-0 has one request and no page left; decode-1 has more requests, and room."""
    config = make_config(folder, num_decode=2, kv_bytes=str(70 * PAGE_BYTES))
    big = make_request("big", make_prompt(0, 1000), replace(GREEDY, max_tokens=120))  # 63 of 70 pages, later all
    small = [make_request(f"small{n}", make_prompt(n, 150), replace(GREEDY, max_tokens=200)) for n in range(3)]
    last = make_request("last", make_prompt(9, 120), replace(GREEDY, max_tokens=2))

    async def scenario():
        async with start_cluster(config) as cluster:
            tasks = []
            for request in (big, *small):
                tasks.append(asyncio.create_task(cluster.answer(request)))
                await wait_until(lambda: cluster.router.worker_of(request.request_id))  # noqa: B023
            await wait_until(lambda: not cluster.router.queue().num_waiting)
            places = {name: cluster.router.worker_of(name) for name in cluster.router._flights}
            answer = await cluster.answer(last)
            still_running = "big" in cluster.router._flights
            return places, answer, still_running, await asyncio.gather(*tasks)

    places, answer, still_running, answers = asyncio.run(scenario())
    assert places == {"big": "decode-0", "small0": "decode-1", "small1": "decode-1", "small2": "decode-1"}
    assert still_running, "the last one had to wait for the first"
    assert [*answers, answer] == generate_alone(config, [big, *small, last])


def test_a_long_prompt_does_not_keep_short_ones_waiting(folder):
    """Neither at the router, though the worker's window is full, nor at the worker."""
    config = make_config(folder, max_batch_tokens=64, kv_bytes="16MiB")
    long = [make_request(f"long{n}", make_prompt(n, 6000), replace(GREEDY, max_tokens=2)) for n in range(3)]
    short = [make_request(f"short{n}", make_prompt(10 + n, 100), replace(GREEDY, max_tokens=2)) for n in range(4)]

    async def scenario():
        async with start_cluster(config) as cluster:
            tasks = [asyncio.create_task(cluster.answer(request)) for request in long]
            await wait_until(lambda: cluster.router.worker_of("long0") and cluster.router.queue().num_waiting == 2)
            answers = await asyncio.gather(*map(cluster.answer, short))
            still_running = sum(not task.done() for task in tasks)
            return await asyncio.gather(*tasks), answers, still_running

    long_answers, short_answers, still_running = asyncio.run(scenario())
    assert still_running == 3
    assert [*long_answers, *short_answers] == generate_alone(config, [*long, *short])


@pytest.mark.parametrize("num_cut", [1, 4])
def test_a_worker_that_cannot_be_reached_is_not_asked_again(folder, num_cut):
    """Its poll has not noticed yet; of more cut workers than there are tries, each costs one."""
    config = make_config(folder, num_decode=5, worker_timeout_s=60.0)
    request = make_request("r", make_prompt(0, 100))

    async def scenario():
        handles = [CutHandle(ServingWorker(f"decode-{idx}", "decode", config)) for idx in range(num_cut)]
        async with start_cluster(config, *handles) as cluster:
            for handle in handles:
                handle.is_cut = True
            answer = cluster.generate(request)
            outcome = join(await answer) if num_cut == 1 else await asyncio.gather(answer, return_exceptions=True)
            return outcome, [handle.num_refused for handle in handles], await ready_workers(cluster)

    outcome, num_refused, ready = asyncio.run(scenario())
    assert max(num_refused) == 1
    assert f"decode-{num_refused.index(1)}" not in ready
    if num_cut == 1:
        assert outcome == generate_alone(config, [request])[0]
    else:
        assert sum(num_refused) == 3
        assert to_api_error(outcome[0]).status == 503


class FarHandle(LocalHandle):
    """A worker that the router has a connection to, and that counts what it is asked otherwise."""

    is_far = True

    def __init__(self, worker):
        super().__init__(worker)
        self.calls = Counter()

    async def call(self, method, /, *args):
        self.calls[method] += 1
        return await super().call(method, *args)


@pytest.mark.parametrize("obstacle", ["none", "connect", "listen"])
def test_a_worker_that_cannot_be_connected_to_is_called(folder, obstacle, monkeypatch, caplog):
    """As where a firewall between nodes lets only Ray pass."""

    async def refuse(*_, **__):
        raise ConnectionRefusedError("nobody is there")

    if obstacle == "connect":
        monkeypatch.setattr("cluster.membership.connect", refuse)
    elif obstacle == "listen":
        monkeypatch.setattr(ServingWorker, "listen", refuse)
    config = make_config(folder)
    requests = [make_request(f"r{n}", make_prompt(n, 100)) for n in range(3)]

    async def scenario():
        handle = FarHandle(ServingWorker("decode-0", "decode", config))
        async with start_cluster(config, handle) as cluster:
            return await asyncio.gather(*map(cluster.answer, requests)), handle.calls

    answers, calls = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert calls["listen"] == 1
    if obstacle == "none":
        assert not calls["poll"] and not calls["admit"]
    else:
        assert calls["poll"] and calls["admit"] == 3
        assert "decode-0: nobody is there; its tokens come by Ray's calls" in caplog.text


@pytest.mark.parametrize(
    "losses, num_counted",
    [
        ([(0.0, True), (0.1, True), (0.3, True), (1.8, True)], 1),  # the network failed, and each was noticed in turn
        ([(0.0, True), (2.0, True), (4.0, True)], 3),  # each froze, with the request
        ([(0.0, False), (0.1, False), (0.2, False)], 3),  # each ended, with the request
        ([(0.0, False), (0.1, True), (5.0, False)], 2),
    ],
)
def test_workers_that_fall_silent_together_are_one_loss(losses, num_counted):
    flight = make_flight(make_request("r", make_prompt(0, 10)))
    for moment, was_silent in losses:
        flight.count_loss(moment, was_silent=was_silent, window_s=1.75)
    assert flight.num_lost == num_counted


def test_a_worker_that_can_be_reached_again_is_used_again(folder):
    config = make_config(folder, worker_timeout_s=60.0)
    requests = [make_request(f"r{n}", make_prompt(n, 100)) for n in range(2)]

    async def scenario():
        handle = CutHandle(ServingWorker("decode-0", "decode", config))
        async with start_cluster(config, handle) as cluster:
            first = await cluster.answer(requests[0])
            handle.is_cut = True
            with pytest.raises(NotReadyError, match="decode-0 cannot be reached"):
                await cluster.answer(make_request("lost", make_prompt(7, 100)))
            health = await cluster.router.health()
            handle.heal()
            await cluster.wait_until_ready()
            return [first, await cluster.answer(requests[1])], health

    answers, health = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert not health.ready
    assert "decode-0" in health.reason


def test_a_prefill_worker_that_cannot_be_reached_costs_time_only(folder):
    config = make_config(folder, num_prefill=2, worker_timeout_s=60.0)
    requests = [make_request(f"r{n}", make_prompt(n, 100)) for n in range(3)]

    async def scenario():
        handle = CutHandle(ServingWorker("prefill-0", "prefill", config))
        async with start_cluster(config, handle) as cluster:
            handle.is_cut = True
            answers = [await cluster.answer(request) for request in requests]
            return answers, handle.num_refused, cluster.num_shipped("prefill-1")

    answers, num_refused, num_shipped = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert num_refused == 1
    assert num_shipped == 2 * 7 * PAGE_BYTES, "the other one computed the other two"


def test_nobody_waits_for_a_frozen_worker_longer_than_its_poll(folder):
    """The first request is being admitted by a frozen worker, and the second waits its turn behind it."""
    config = make_config(folder, num_decode=2, worker_timeout_s=1.0)
    requests = [make_request(f"r{n}", make_prompt(n, 100)) for n in range(2)]

    async def scenario():
        async with open_worker("decode-0", "decode", config) as decode, start_cluster(config, decode) as cluster:
            decode.freeze()
            async with asyncio.timeout(10.0):
                return await asyncio.gather(*map(cluster.answer, requests))

    assert asyncio.run(scenario()) == generate_alone(config, requests)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("part", ["sender", "worker"])
def test_a_prefill_worker_stops_while_it_ships(folder, transport, part):
    """Its transport alone, or all of it."""
    config = make_config(folder, transport=transport, max_batch_tokens=16)
    request = make_request("r", make_prompt(0, 2000))

    async def scenario():
        async with start_cluster(config) as cluster:
            task = asyncio.create_task(cluster.answer(request))
            receiver = cluster.workers["decode-0"].decode_side.receivers[transport]
            await wait_until(lambda: receiver.bytes_received)
            worker = cluster.workers["prefill-0"] if part == "sender" else cluster.workers.pop("prefill-0")
            if part == "sender":
                await asyncio.to_thread(worker.prefill_side.senders[transport].close)
            else:
                await worker.close()
            assert (await cluster.stats("decode-0")).num_generated_tokens == 0, "it was stopped too late"
            return await task, await ready_workers(cluster)

    answer, ready = asyncio.run(scenario())
    assert answer == generate_alone(config, [request])[0]
    assert ready == (["prefill-0", "decode-0"] if part == "sender" else ["decode-0"])


def test_what_waits_when_the_router_stops_ends_in_an_error(folder):
    config = make_config(folder, max_batch_tokens=16)

    async def scenario():
        async with start_cluster(config) as cluster:
            requests = [make_request(f"r{n}", make_prompt(n, 2000)) for n in range(3)]  # one placed, two wait
            tasks = [asyncio.create_task(cluster.answer(request)) for request in requests]
            await wait_until(lambda: cluster.router.queue().num_waiting == 2)
            await cluster.router.stop()
            async with asyncio.timeout(10.0):
                return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = asyncio.run(scenario())
    assert [type(outcome) for outcome in outcomes] == [NotReadyError] * 3


def test_workers_that_cannot_start_say_why(tmp_path, folder):
    config = make_config(folder)
    (tmp_path / "config.json").write_text("{}")
    broken = replace(config, model=replace(config.model, path=str(tmp_path)))

    async def scenario():
        decode = LocalHandle(ServingWorker("decode-0", "decode", broken))
        async with start_cluster(config, decode, waits=False) as cluster:

            async def is_settled():
                health = await cluster.router.health()
                return str(tmp_path) in health.reason and health.workers[0].ready

            await wait_until(is_settled)
            with pytest.raises(NotReadyError, match=str(tmp_path)) as caught:
                await cluster.answer(make_request("r", [1, 2, 3]))
            return to_api_error(caught.value).status

    assert asyncio.run(scenario()) == 503


def test_stats_and_health_name_every_worker(folder):
    config = make_config(folder, transport="shared_memory", num_prefill=2)

    async def scenario():
        async with start_cluster(config) as cluster:
            await cluster.answer(make_request("r", make_prompt(0, 100)))

            async def has_heard():
                return sum(each.engine.num_generated_tokens for each in await cluster.router.worker_stats()) == 24

            await wait_until(has_heard)
            return await cluster.router.worker_stats(), await cluster.router.health()

    stats, health = asyncio.run(scenario())
    assert [(each.name, each.role, each.transport, each.alive) for each in stats] == [
        ("prefill-0", "prefill", "shared_memory", True),
        ("prefill-1", "prefill", "shared_memory", True),
        ("decode-0", "decode", "shared_memory", True),
    ]
    assert [each.bytes_shipped for each in stats] == [7 * PAGE_BYTES, 0, 0]
    assert [each.engine.num_generated_tokens for each in stats] == [1, 0, GREEDY.max_tokens - 1]
    assert (health.ready, health.reason, len(health.workers)) == (True, "", 3)


def test_the_router_loads_no_torch():
    code = "import sys, cluster.router; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("num_turns", range(5))
def test_a_cancelled_poll_that_is_answered_at_the_same_moment_is_cancelled(num_turns):
    """A router that closes cancels its polls: one that went on would be waited for without end."""

    class Worker:
        name, role = "decode-0", "decode"

        async def poll(self, max_wait_s):
            await self.news

    async def scenario():
        worker = Worker()
        worker.news = asyncio.get_running_loop().create_future()
        peer = WorkerPeer(LocalHandle(worker), call_timeout_s=10.0)
        task = asyncio.create_task(peer.poll(ClusterConfig()))
        await asyncio.sleep(0.01)
        worker.news.set_result(None)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        had_ended = task.done()
        task.cancel()
        await asyncio.wait([task], timeout=10.0)
        return had_ended or task.cancelled()

    assert asyncio.run(scenario())
