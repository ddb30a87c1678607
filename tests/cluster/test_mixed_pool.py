"""Under policy=splitwise workers do what they were not started for, at once and without a wrong token."""

import asyncio
from dataclasses import replace

import pytest

from cluster.policies.policy import Policy
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

SMALL_STEPS = 16  # tokens: 64 that wait make a long queue


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama", max_position_embeddings=8192)


def run_all(config, requests):
    """Answers to all at once, how many tokens each worker generated, bytes it shipped, and how often it was mixed."""

    async def scenario():
        async with start_cluster(config) as cluster:
            pools = set()

            async def watch():
                while True:
                    pools.update((each.name, each.pool) for each in await cluster.router.worker_stats())
                    await asyncio.sleep(0.002)

            watching = asyncio.create_task(watch())
            answers = await asyncio.gather(*map(cluster.answer, requests))
            watching.cancel()
            generated = {name: (await cluster.stats(name)).num_generated_tokens for name in cluster.workers}
            shipped = {name: cluster.num_shipped(name) for name in cluster.workers}
            at_home = [each.pool == each.role for each in await cluster.router.worker_stats()]
            return answers, generated, shipped, pools, at_home

    return asyncio.run(scenario())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_decode_workers_compute_prompts_when_the_queue_is_long(folder, transport):
    config = make_config(
        folder, transport=transport, num_decode=2, policy="splitwise", max_batch_tokens=SMALL_STEPS, prefix_cache=False
    )
    requests = [make_request(f"r{n}", make_prompt(n, 300)) for n in range(8)]
    answers, _, shipped, pools, at_home = run_all(config, requests)
    assert answers == generate_alone(config, requests)
    assert shipped["prefill-0"]
    assert {("decode-0", "mixed"), ("decode-1", "mixed")} & pools
    assert all(at_home)


def test_prefill_workers_decode_when_decode_workers_are_full(folder):
    config = make_config(folder, policy="splitwise", max_sequences=2)
    requests = [make_request(f"r{n}", make_prompt(n, 100), replace(GREEDY, max_tokens=100)) for n in range(4)]
    answers, generated, _, pools, at_home = run_all(config, requests)
    assert answers == generate_alone(replace(config, engine=replace(config.engine, max_sequences=16)), requests)
    assert generated["prefill-0"] >= 100
    assert ("prefill-0", "mixed") in pools
    assert all(at_home)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_workers_that_wait_for_each_others_pages_go_on(folder, transport, num_workers):
    """Each holds pages for prompts that the other is to compute, and has none left to compute them."""
    config = make_config(
        folder,
        transport=transport,
        num_prefill=num_workers,
        num_decode=num_workers,
        policy="splitwise",
        max_batch_tokens=32,
        kv_bytes=str(50 * 8192),
    )
    requests = [make_request(f"r{n}", make_prompt(n, 150 + 37 * n % 350)) for n in range(24)]
    answers, generated, *_ = run_all(config, requests)
    assert answers == generate_alone(config, requests)
    assert all(generated.values())


class Backwards(Policy):
    """Decode workers compute, prefill workers generate."""

    repurposes = True

    def choose(self, prefill, decode, *, num_tokens):
        return prefill[-1], decode[0]


@pytest.mark.parametrize("ranks", [{}, {"prefill_ranks": 2}, {"decode_ranks": 2}])
def test_decode_workers_ship_to_prefill_workers(folder, ranks):
    config = make_config(folder, policy="splitwise", **ranks)
    requests = [make_request(f"r{n}", make_prompt(n, 300)) for n in range(3)]

    async def scenario():
        async with start_cluster(config) as cluster:
            cluster.router._policy = Backwards()
            answers = [await cluster.answer(request) for request in requests]
            return answers, {name: cluster.num_shipped(name) > 0 for name in cluster.workers}

    answers, shipped = asyncio.run(scenario())
    assert [[delta.token_ids for delta in answer] for answer in answers] == [
        [delta.token_ids for delta in expected] for expected in generate_alone(config, requests)
    ]
    assert shipped == {"prefill-0": False, "decode-0": True}


@pytest.mark.parametrize("hit", ["kill", "freeze"])
def test_prefill_workers_go_on_when_every_decode_worker_is_lost(folder, hit):
    config = make_config(folder, policy="splitwise")
    params = replace(GREEDY, max_tokens=2000)
    request = make_request("r", make_prompt(0, 500), params)

    async def scenario():
        async with open_worker("decode-0", "decode", config) as decode, start_cluster(config, decode) as cluster:
            deltas, tasks = [], []

            async def read():
                async for new in cluster.router.submit(request):
                    deltas.extend(new)

            tasks.append(asyncio.create_task(read()))
            await wait_until(lambda: sum(len(delta.token_ids) for delta in deltas) > 100)
            getattr(decode, hit)()
            await asyncio.gather(*tasks)
            health = await cluster.router.health()
            assert health.ready
            return deltas

    assert join(asyncio.run(scenario())) == generate_alone(config, [request])[0]
