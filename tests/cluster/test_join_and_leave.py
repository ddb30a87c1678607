"""Workers come, drain and go while requests run: nobody notices."""

import asyncio
from dataclasses import replace

import pytest

from cluster.handle import LocalHandle
from cluster.membership import ROSTER_INTERVAL_S
from cluster.serving import NotReadyError
from cluster.serving_worker import ServingWorker
from tests.cluster.small_cluster import generate_alone, join, make_config, make_prompt, start_cluster, wait_until
from tests.longctx.engines import GREEDY, make_request
from tests.tiny_checkpoints import make_checkpoint

LONG = replace(GREEDY, max_tokens=500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama", max_position_embeddings=8192)


def follow_roster(cluster):
    """Let the cluster's workers be what ``cluster.workers`` holds from now on."""

    async def roster():
        return [LocalHandle(worker) for worker in cluster.workers.values()]

    cluster.router._watch(roster)


async def read(cluster, request, seen):
    async for deltas in cluster.router.submit(request):
        seen.setdefault(cluster.router.worker_of(request.request_id), []).extend(deltas)


def test_a_worker_that_comes_is_used_and_one_that_goes_is_forgotten(folder):
    config = make_config(folder)
    requests = [make_request(f"r{n}", make_prompt(n, 100), replace(GREEDY, max_tokens=1200)) for n in range(2)]

    async def scenario():
        async with start_cluster(config) as cluster:
            follow_roster(cluster)
            first = asyncio.create_task(cluster.answer(requests[0]))
            await wait_until(lambda: cluster.router.worker_of("r0"))
            worker = ServingWorker("decode-1", "decode", config)
            cluster.workers["decode-1"] = worker
            cluster.ranks["decode-1"] = []
            await wait_until(lambda: len(cluster.router._peers) == 3)
            await cluster.wait_until_ready()
            seen = {}
            await read(cluster, requests[1], seen)
            answers = [await first, join([delta for deltas in seen.values() for delta in deltas])]
            del cluster.workers["decode-1"]
            await worker.close()
            await wait_until(lambda: len(cluster.router._peers) == 2)
            await asyncio.sleep(ROSTER_INTERVAL_S)
            return answers, set(seen), [each.name for each in await cluster.router.worker_stats()]

    answers, places, names = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert places == {"decode-1"}
    assert names == ["prefill-0", "decode-0"]


@pytest.mark.parametrize("timeout_s, places", [(60.0, {"decode-0"}), (0.05, {"decode-0", "decode-1"})])
def test_a_worker_that_drains_takes_nothing_new_and_loses_nothing(folder, timeout_s, places):
    """Its requests stay until they end, or go on elsewhere when they take too long."""
    config = make_config(folder, num_decode=2, drain_timeout_s=timeout_s)
    requests = [make_request(f"r{n}", make_prompt(n, 100), LONG) for n in range(5)]

    async def scenario():
        async with start_cluster(config) as cluster:
            seen = {}
            reading = asyncio.create_task(read(cluster, requests[0], seen))
            await wait_until(lambda: seen)
            worker = cluster.workers["decode-0"]
            await worker.drain()
            await wait_until(lambda: any(peer.is_draining for peer in cluster.router._peers))
            others = [asyncio.create_task(cluster.answer(request)) for request in requests[1:]]
            await wait_until(lambda: all(cluster.router.worker_of(f"r{n}") for n in range(1, 5)))
            assert {cluster.router.worker_of(f"r{n}") for n in range(1, 5)} == {"decode-1"}
            health = await cluster.router.health()
            assert [each.reason for each in health.workers if not each.ready] == ["it is draining"]
            await reading
            answers = [join([delta for deltas in seen.values() for delta in deltas]), *[await each for each in others]]
            await wait_until(lambda: worker.engine.num_requests == 0)
            assert await worker.count_requests() == 0
            await worker.drain(False)
            await wait_until(lambda: not any(peer.is_draining for peer in cluster.router._peers))
            return answers, set(seen)

    answers, seen = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert seen == places


def test_the_only_worker_that_drains_keeps_what_it_has(folder):
    config = make_config(folder, drain_timeout_s=0.0)
    requests = [make_request(f"r{n}", make_prompt(n, 100), LONG) for n in range(2)]

    async def scenario():
        async with start_cluster(config) as cluster:
            seen = {}
            reading = asyncio.create_task(read(cluster, requests[0], seen))
            await wait_until(lambda: seen)
            await cluster.workers["decode-0"].drain()
            await wait_until(lambda: any(peer.is_draining for peer in cluster.router._peers))
            with pytest.raises(NotReadyError, match="decode-0: it is draining"):
                await cluster.answer(requests[1])
            await reading
            await cluster.workers["decode-0"].drain(False)
            await wait_until(lambda: cluster.router._peers.has_decode)
            return [join(seen["decode-0"]), await cluster.answer(requests[1])]

    assert asyncio.run(scenario()) == generate_alone(config, requests)


def test_a_prefill_worker_that_drains_sends_what_it_began(folder):
    config = make_config(folder, num_prefill=2, max_batch_tokens=16)
    requests = [make_request(f"r{n}", make_prompt(n, 1000)) for n in range(4)]

    async def scenario():
        async with start_cluster(config) as cluster:
            tasks = [asyncio.create_task(cluster.answer(request)) for request in requests[:2]]
            await wait_until(lambda: cluster.num_shipped("prefill-0"))
            await cluster.workers["prefill-0"].drain()
            await wait_until(lambda: any(peer.is_draining for peer in cluster.router._peers))
            more = [await cluster.answer(request) for request in requests[2:]]
            answers = [*[await task for task in tasks], *more]
            generated = {name: (await cluster.stats(name)).num_generated_tokens for name in cluster.workers}
            return answers, generated

    answers, generated = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert (generated["prefill-0"], generated["prefill-1"]) == (1, 3)
