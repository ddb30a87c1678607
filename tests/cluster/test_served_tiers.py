"""Landmark blocks below, prefill and decode apart: the answers of one engine whose blocks are near."""

import asyncio
from dataclasses import replace

import pytest

from cluster.config import ClusterConfig, PrefillConfig, ServeConfig
from cluster.preflight import check
from longctx.attention.config import AttentionConfig
from longctx.errors import ConfigError
from longctx.models.config import ModelConfig
from memory.config import TransportConfig
from memory.tiered_pages import MIN_CACHE
from tests.cluster.small_cluster import generate_alone, make_config, make_prompt, start_cluster
from tests.longctx.engines import GREEDY, make_request
from tests.tiny_checkpoints import make_checkpoint

PAGE_BYTES = 8448
NUM_NEAR = 64 // 16 + 2 * 16 + MIN_CACHE
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
            answers = [await cluster.answer(request) for request in requests]
            together = [replace(request, request_id=f"again-{request.request_id}") for request in requests]
            again = await asyncio.gather(*map(cluster.answer, together))
            return answers, again, [cluster.num_shipped(name) for name in ("prefill-0", "prefill-1")]

    answers, again, num_shipped = asyncio.run(scenario())
    expected = generate_alone(config, requests)
    assert answers == expected
    assert [[d.token_ids for d in answer] for answer in again] == [[d.token_ids for d in e] for e in expected]
    assert all(num_shipped)


def test_many_at_once_with_little_room_below(folder):
    """Some wait for room, some are preempted, one is given up on its way."""
    config = tiered_config(folder, "host", num_below=50, num_prefill=2)
    params = replace(GREEDY, max_tokens=48)
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
    with pytest.raises(ConfigError, match=r"attention\.blocks=host is not allowed with cluster\.prefill\.sp_degree=2"):
        served("host", ClusterConfig(prefill=PrefillConfig(sp_degree=2)))
