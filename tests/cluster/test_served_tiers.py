"""Landmark blocks below, prefill and decode apart: the answers of one engine whose blocks are near."""

import asyncio
from dataclasses import replace

import pytest

from cluster.config import ClusterConfig, DecodeConfig, PrefillConfig, ServeConfig
from cluster.preflight import check
from longctx.attention.config import AttentionConfig
from longctx.errors import ConfigError
from longctx.models.config import ModelConfig
from memory.config import TransportConfig
from memory.layout import MIN_CACHE
from tests.cluster.small_cluster import generate_alone, make_config, make_prompt, start_cluster
from tests.longctx.engines import GREEDY, make_request
from tests.tiny_checkpoints import make_checkpoint

PAGE_BYTES = 8448
NUM_NEAR = 2 * 64 // 16 + 2 * 16 + MIN_CACHE  # what one of two ranks takes
LENGTHS = (1, 16, 65, 200, 900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    method = {"name": "landmark", "block_size": 16, "landmark_token_id": 258}
    return make_checkpoint(tmp_path_factory.mktemp("landmark"), "llama", longctx_attention=method)


def tiered_config(folder, blocks, *, num_below=400, **options):
    """As little near as an engine takes."""
    config = make_config(folder, attention="native", kv_bytes=str(NUM_NEAR * PAGE_BYTES), **options)
    return replace(config, attention=AttentionConfig(blocks=blocks, blocks_bytes=str(num_below * PAGE_BYTES)))


@pytest.mark.parametrize(("transport", "blocks"), [("shared_memory", "host"), ("tcp", "host"), ("auto", "file")])
def test_apart_equals_one_engine(folder, transport, blocks):
    """A prompt with more blocks than fit near, then all at once, from two prefill workers."""
    config = tiered_config(folder, blocks, transport=transport, num_prefill=2)
    requests = [make_request(f"r{n}", make_prompt(n, n)) for n in LENGTHS]

    async def scenario():
        async with start_cluster(config) as cluster:
            answers, again = await cluster.answer_twice(requests)
            return answers, again, [cluster.num_shipped(name) for name in ("prefill-0", "prefill-1")]

    answers, again, num_shipped = asyncio.run(scenario())
    expected = generate_alone(config, requests)
    assert answers == expected
    assert [[d.token_ids for d in answer] for answer in again] == [[d.token_ids for d in e] for e in expected]
    assert all(num_shipped)


@pytest.mark.parametrize(
    ("prefill_ranks", "decode_ranks", "transport", "blocks"),
    [
        (2, 2, "shared_memory", "host"),
        pytest.param(2, 1, "tcp", "file", marks=pytest.mark.slow),
        pytest.param(1, 2, "auto", "file", marks=pytest.mark.slow),
    ],
)
def test_ranks_send_and_get_their_own_blocks(folder, prefill_ranks, decode_ranks, transport, blocks):
    """Each from its own tier into those of others; a prefix that was sent for an earlier request is found."""
    ranks = {"prefill_ranks": prefill_ranks, "decode_ranks": decode_ranks}
    config = tiered_config(folder, blocks, transport=transport, num_below=200, **ranks)
    params = replace(GREEDY, max_tokens=40, n=2)
    requests = [make_request(f"r{n}", make_prompt(n, n), params) for n in LENGTHS]
    later = [make_request(f"p{n}", make_prompt(900, 400) + make_prompt(n, 10 * n), params) for n in (1, 2)]
    expected = generate_alone(config, [*requests, *later])

    async def scenario():
        async with start_cluster(config) as cluster:
            answers = await asyncio.gather(*map(cluster.answer, requests))
            return [*answers, *[await cluster.answer(request) for request in later]], cluster.num_shipped()

    answers, num_shipped = asyncio.run(scenario())
    assert answers == expected
    assert num_shipped > 0


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_many_at_once_with_little_room_below(folder, num_ranks):
    """Some wait for room, some are preempted, one is given up on its way."""
    ranks = {"prefill_ranks": num_ranks, "decode_ranks": num_ranks}
    config = tiered_config(folder, "host", num_below=50 // num_ranks, num_prefill=2, **ranks)
    params = replace(GREEDY, max_tokens=96)
    requests = [make_request(f"r{n}", make_prompt(n, 40 + 50 * n), replace(params, n=1 + n % 2)) for n in range(6)]

    async def scenario():
        async with start_cluster(config) as cluster:
            given_up = asyncio.create_task(cluster.answer(make_request("given-up", make_prompt(99, 700), params)))
            tasks = [asyncio.create_task(cluster.answer(request)) for request in requests]
            await asyncio.sleep(0.3)
            given_up.cancel()
            answers = await asyncio.gather(*tasks)
            return answers, [await cluster.stats(name) for name in cluster.workers]

    answers, stats = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert sum(each.num_preemptions for each in stats) > 0


def test_deployments_that_are_refused(folder):
    def served(blocks, cluster=None, *, blocks_bytes="auto", **transport):
        attention, cluster = AttentionConfig(blocks=blocks, blocks_bytes=blocks_bytes), cluster or ClusterConfig()
        model = ModelConfig(path=str(folder))
        check(ServeConfig(model, transport=TransportConfig(**transport), cluster=cluster, attention=attention))

    served("host")
    served("file", name="tcp")
    served("host", name="shared_memory")
    served("file", ClusterConfig(num_prefill_workers=0), name="shared_memory")
    with pytest.raises(ConfigError, match=r"transport\.name=shared_memory is not allowed with attention\.blocks=file"):
        served("file", name="shared_memory")
    with pytest.raises(ConfigError, match=r"attention\.blocks_bytes=99999GiB for each of 2 processes is more than"):
        served("host", blocks_bytes="99999GiB")
    ranks = ClusterConfig(prefill=PrefillConfig(sp_degree=2), decode=DecodeConfig(sp_degree=2))
    served("host", ranks)
    with pytest.raises(ConfigError, match=r"attention\.blocks_bytes=99999GiB for each of 4 processes is more than"):
        served("host", ranks, blocks_bytes="99999GiB")
