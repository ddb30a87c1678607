"""CCA that fetches groups, prefill and decode apart: the answers of one engine, and nothing stays taken."""

import asyncio
from dataclasses import replace

import pytest

from cluster.config import ClusterConfig, DecodeConfig, PrefillConfig, ServeConfig
from cluster.preflight import check
from longctx.attention.config import AttentionConfig
from longctx.errors import ConfigError
from longctx.models.config import ModelConfig
from memory.config import TransportConfig
from tests.cluster.small_cluster import generate_alone, make_config, make_prompt, start_cluster, wait_until
from tests.longctx.engines import GREEDY, make_request
from tests.tiny_checkpoints import make_checkpoint

PAGE_BYTES = 8192
LENGTHS = (1, 16, 65, 200, 700)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def fetch_config(folder, blocks, *, num_near=200, num_below=100, core_fetch=2, **options):
    """A window of 8 tokens near, the rest below."""
    config = make_config(folder, attention="native", kv_bytes=str(num_near * PAGE_BYTES), **options)
    below = {"blocks": blocks, "blocks_bytes": str(num_below * PAGE_BYTES)} if core_fetch else {}
    return replace(config, attention=AttentionConfig("cca", group_size=4, window=8, core_fetch=core_fetch, **below))


async def check_below(cluster):
    """Nothing is held below at any worker."""

    def is_free():
        below = [worker.engine._scheduler._below for worker in cluster.workers.values()]
        return all(pages.num_free == pages.num_pages and not any(pages.refcounts) for pages in below if pages)

    await cluster.wait_until_free()
    await wait_until(is_free, 2.0)


@pytest.mark.parametrize(("transport", "blocks"), [("shared_memory", "host"), ("tcp", "host"), ("auto", "file")])
def test_apart_equals_one_engine(folder, transport, blocks):
    config = fetch_config(folder, blocks, transport=transport, num_prefill=2)
    requests = [make_request(f"r{n}", make_prompt(n, n)) for n in LENGTHS]

    async def scenario():
        async with start_cluster(config) as cluster:
            answers, again = await cluster.answer_twice(requests)
            await check_below(cluster)
            return answers, again, [cluster.num_shipped(name) for name in ("prefill-0", "prefill-1")]

    answers, again, num_shipped = asyncio.run(scenario())
    expected = generate_alone(config, requests)
    assert answers == expected
    assert [[d.token_ids for d in answer] for answer in again] == [[d.token_ids for d in e] for e in expected]
    assert all(num_shipped)


@pytest.mark.parametrize(
    ("prefill_ranks", "decode_ranks", "transport", "blocks", "core_fetch"),
    [
        (2, 2, "shared_memory", "host", 2),
        pytest.param(1, 2, "tcp", "file", 2, marks=pytest.mark.slow),
        pytest.param(2, 1, "auto", "file", 2, marks=pytest.mark.slow),
        pytest.param(1, 2, "tcp", "near", 0, marks=pytest.mark.slow),
    ],
)
def test_ranks_on_either_side(folder, prefill_ranks, decode_ranks, transport, blocks, core_fetch):
    """Rank 0 sends, rank 0 receives and hands over; forks of what arrived, all at once."""
    ranks = {"prefill_ranks": prefill_ranks, "decode_ranks": decode_ranks}
    config = fetch_config(folder, blocks, transport=transport, core_fetch=core_fetch, **ranks)
    params = replace(GREEDY, max_tokens=20, n=2)
    requests = [make_request(f"r{n}", make_prompt(n, n), params) for n in (1, 65, 400)]

    async def scenario():
        async with start_cluster(config) as cluster:
            answers = await asyncio.gather(*map(cluster.answer, requests))
            await check_below(cluster)
            return answers, cluster.num_shipped()

    answers, num_shipped = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert num_shipped > 0


def test_many_at_once_with_little_room_below(folder):
    """Some wait for room, some are preempted, one is given up on its way."""
    config = fetch_config(folder, "host", transport="shared_memory", num_below=40)
    params = replace(GREEDY, max_tokens=64)
    requests = [make_request(f"r{n}", make_prompt(n, 40 + 50 * n), replace(params, n=1 + n % 2)) for n in range(5)]

    async def scenario():
        async with start_cluster(config) as cluster:
            given_up = asyncio.create_task(cluster.answer(make_request("given-up", make_prompt(99, 600), params)))
            tasks = [asyncio.create_task(cluster.answer(request)) for request in requests]
            await asyncio.sleep(0.3)
            given_up.cancel()
            answers = await asyncio.gather(*tasks)
            await check_below(cluster)
            return answers, [await cluster.stats(name) for name in cluster.workers]

    answers, stats = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert sum(each.num_preemptions for each in stats) > 0


def test_deployments_that_are_refused(folder):
    def served(blocks="near", *, blocks_bytes="auto", prefill_ranks=1, decode_ranks=1, **transport):
        attention = AttentionConfig("cca", core_fetch=2, blocks=blocks, blocks_bytes=blocks_bytes)
        ranks = ClusterConfig(prefill=PrefillConfig(prefill_ranks), decode=DecodeConfig(decode_ranks))
        model = ModelConfig(path=str(folder))
        check(ServeConfig(model, transport=TransportConfig(**transport), cluster=ranks, attention=attention))

    served(name="shared_memory")
    served("file", prefill_ranks=2, decode_ranks=2)
    served("file", blocks_bytes="99999GiB")
    with pytest.raises(ConfigError, match=r"transport\.name=shared_memory is not allowed with attention\.blocks=file"):
        served("file", name="shared_memory")
    for blocks in ("near", "host"):
        with pytest.raises(ConfigError, match=r"attention\.blocks_bytes=99999GiB for each of 3 processes is more than"):
            served(blocks, blocks_bytes="99999GiB", prefill_ranks=2)
