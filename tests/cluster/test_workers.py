"""Prefill and decode apart give what one engine gives, token for token; whoever leaves, leaves nothing behind."""

import asyncio
from dataclasses import replace
from importlib.util import find_spec

import pytest

from cluster.config import RayConfig
from cluster.openai_errors import to_api_error
from cluster.preflight import check
from cluster.serving_worker import ServingWorker
from longctx.errors import ConfigError, LongctxError, QueueFullError, RequestError
from longctx.messages import OutputDelta, SamplingParams
from tests.cluster.small_cluster import TRANSPORTS, generate_alone, join, make_config, make_prompt, start_cluster
from tests.longctx.engines import GREEDY, make_request
from tests.tiny_checkpoints import FAMILIES, make_checkpoint

POOL_BYTES = str(50 * 8192)  # 50 pages of 16 tokens
LENGTHS = (1, 16, 17, 50, 64, 65, 200)  # one token to several chunks, at and beside the borders of pages and batches

VARIANTS = {name: (name, {}) for name in FAMILIES} | {
    "mqa": ("llama", {"num_key_value_heads": 1}),
    "landmark": (
        "llama",
        {"longctx_attention": {"name": "landmark", "block_size": 16, "landmark_token_id": 258}},
    ),
    "cca": ("llama", {"longctx_attention": {"name": "cca", "group_size": 4, "window": 20}}),
    "dynamic_rope": (
        "llama",
        {
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_apart_equals_one_engine(tmp_path, variant, transport):
    family, overrides = VARIANTS[variant]
    config = make_config(make_checkpoint(tmp_path / "model", family, **overrides), transport=transport)
    requests = [make_request(f"r{n}", make_prompt(n, n)) for n in LENGTHS]

    async def scenario():
        async with start_cluster(config) as cluster:
            answers, again = await cluster.answer_twice(requests)
            return answers, again, cluster.num_shipped()

    expected = generate_alone(config, requests)
    answers, again, num_shipped = asyncio.run(scenario())
    assert answers == expected
    assert [[d.token_ids for d in answer] for answer in again] == [[d.token_ids for d in e] for e in expected]
    assert num_shipped > 0


@pytest.mark.parametrize(
    "transport, codec",
    [("torch_distributed", "none"), ("tcp", "zstd")] + [("nixl", "none")] * (find_spec("nixl") is not None),
)
def test_other_ways(folder, transport, codec):
    """Transports that are rarer, and what travels under a codec that loses nothing."""
    config = make_config(folder, transport=transport, codec=codec, prefill_ranks=2)
    requests = [make_request(f"r{n}", make_prompt(n, n)) for n in LENGTHS]

    async def scenario():
        async with start_cluster(config) as cluster:
            return (await cluster.answer_twice(requests))[0], cluster.num_shipped()

    answers, num_shipped = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert num_shipped > 0


@pytest.mark.parametrize(
    "prefill, decode",
    [
        ({"attention": "native"}, {}),
        ({}, {"attention": "native"}),
        ({"dtype": "bfloat16"}, {}),
        ({"attention": "native"}, {"dtype": "bfloat16"}),
    ],
)
def test_roles_of_their_own_kind(folder, prefill, decode):
    """Pages in another order, or of other elements: converted on their way."""
    config = make_config(folder, prefill_own=prefill, decode_own=decode, codec="zstd")
    requests = [make_request(f"r{n}", make_prompt(n, n)) for n in LENGTHS]

    async def scenario():
        async with start_cluster(config) as cluster:
            return (await cluster.answer_twice(requests))[0], cluster.num_shipped()

    answers, num_shipped = asyncio.run(scenario())
    expected = generate_alone(config, requests)
    if "dtype" not in prefill | decode:
        assert answers == expected
    for answer, alone in zip(answers, expected, strict=True):
        assert [len(each.token_ids) for each in answer] == [len(each.token_ids) for each in alone]
        assert not any(each.error for each in answer)
    assert num_shipped > 0


def test_conversion_is_refused_where_it_cannot_be(folder):
    for options, message in (
        ({"transport": "shared_memory", "page_size": 16}, "converted by tcp alone"),
        ({"page_size": None}, "engine.page_size=null"),
    ):
        config = make_config(folder, prefill_own={"dtype": "bfloat16"}, **options)
        with pytest.raises(ConfigError, match=message):
            check(config)
    config = make_config(folder, prefill_own={"dtype": "bfloat16"}, transport="auto")
    assert check(replace(config, ray=RayConfig(address="auto")))[0].transport.name == "tcp"


@pytest.fixture(scope="module")
def greedy(folder):
    """What follows ``make_prompt(0, 100)`` greedily."""
    return generate_alone(make_config(folder), [make_request("r", make_prompt(0, 100))])[0][0]


SEEDED = SamplingParams(temperature=1.3, top_p=0.95, top_k=60, min_p=0.001, seed=7, max_tokens=24, ignore_eos=True)
SAMPLING = {
    "seeded": lambda _: SEEDED,
    "several": lambda _: replace(SEEDED, n=3, logprobs=3),
    "logprobs": lambda _: replace(GREEDY, logprobs=0),
    "one_token": lambda _: replace(GREEDY, max_tokens=1, n=2, logprobs=2),
    "penalties": lambda _: replace(GREEDY, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3),
    "bias": lambda greedy: replace(GREEDY, logit_bias=((greedy.token_ids[0], -100.0), (65, 5.0))),
    "stop_string": lambda greedy: replace(GREEDY, stop=(greedy.text[6:9],)),
    "stop_at_once": lambda greedy: replace(GREEDY, stop=(greedy.text[:1],)),
    "stop_id": lambda greedy: replace(GREEDY, stop_token_ids=(greedy.token_ids[5],)),
    "stop_id_at_once": lambda greedy: replace(GREEDY, stop_token_ids=(greedy.token_ids[0],)),
    "min_tokens": lambda greedy: replace(GREEDY, stop_token_ids=(greedy.token_ids[0],), min_tokens=9),
    "rest_of_context": lambda _: replace(GREEDY, max_tokens=None),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_goes_on_where_the_prefill_worker_began(folder, greedy, name):
    config = make_config(folder, max_context=256)
    request = make_request("r", make_prompt(0, 100), SAMPLING[name](greedy))

    async def scenario():
        async with start_cluster(config) as cluster:
            return await cluster.answer(request), cluster.num_shipped()

    answer, num_shipped = asyncio.run(scenario())
    [expected] = generate_alone(config, [request])
    assert [without_logprobs(delta) for delta in answer] == [without_logprobs(delta) for delta in expected]
    for ours, theirs in zip(answer, expected, strict=True):
        assert [entry.logprob for entry in ours.logprobs] == pytest.approx([e.logprob for e in theirs.logprobs])
        assert [[t for t, _ in e.top] for e in ours.logprobs] == [[t for t, _ in e.top] for e in theirs.logprobs]
    assert num_shipped > 0
    assert answer != [greedy]  # the parameters matter


def without_logprobs(delta):
    return replace(delta, logprobs=())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_shared_prefix_is_shipped_once(folder, transport):
    config = make_config(folder, transport=transport)
    size, prefix = config.engine.page_size, make_prompt(0, 160)
    requests = [make_request(f"r{n}", prefix + make_prompt(n, length)) for n, length in ((1, 20), (2, 50), (3, 7))]

    async def scenario():
        async with start_cluster(config) as cluster:
            page_bytes = cluster.workers["prefill-0"].engine.pool.layout.page_bytes
            shipped, cached, answers = [], [], []
            for request in requests:
                before = cluster.num_shipped()
                deltas = await cluster.generate(request)
                shipped.append((cluster.num_shipped() - before) // page_bytes)
                cached.append({delta.num_cached_tokens for delta in deltas})
                answers.append(join(deltas))
            return shipped, cached, answers

    shipped, cached, answers = asyncio.run(scenario())
    assert shipped == [-(-180 // size), -(-50 // size), -(-7 // size)]
    assert cached == [{0}, {160}, {160}]
    assert answers == generate_alone(config, requests)


def test_salts_share_nothing(folder):
    config = make_config(folder)
    requests = [make_request(f"r{n}", make_prompt(0, 100), cache_salt=salt) for n, salt in enumerate(("", "a", "a"))]

    async def scenario():
        async with start_cluster(config) as cluster:
            return [(await cluster.generate(request))[0].num_cached_tokens for request in requests]

    assert asyncio.run(scenario()) == [0, 0, 96]


def test_little_is_computed_where_it_is_decoded(folder):
    """A short prompt, or one of which the decode worker lacks little; and what it lacks much of is shipped."""
    config = make_config(folder, local_prefill_tokens=32)
    long = make_prompt(0, 200)
    requests = [
        make_request("short", make_prompt(1, 32)),
        make_request("long", long),
        make_request("known", long + make_prompt(2, 20)),
        make_request("half-known", long + make_prompt(3, 40)),
    ]

    async def scenario():
        async with start_cluster(config) as cluster:
            answers, has_shipped = [], []
            for request in requests:
                before = cluster.num_shipped()
                answers.append(await cluster.answer(request))
                has_shipped.append(cluster.num_shipped() > before)
            return answers, has_shipped

    answers, has_shipped = asyncio.run(scenario())
    assert has_shipped == [False, True, False, True]
    assert answers == generate_alone(config, requests)


@pytest.mark.parametrize("transport, prefix_cache", [("tcp", True), ("shared_memory", False)])
def test_many_at_once_in_a_small_pool(folder, transport, prefix_cache):
    config = make_config(folder, transport=transport, kv_bytes=POOL_BYTES, prefix_cache=prefix_cache, num_decode=2)
    params = replace(GREEDY, max_tokens=80)
    requests = [make_request(f"r{n}", make_prompt(n, 1 + 7 * n), params) for n in range(20)]
    requests += [make_request(f"twin{n}", make_prompt(n, 1 + 7 * n), replace(SEEDED, n=2)) for n in range(4)]

    async def scenario():
        async with start_cluster(config) as cluster:
            answers = await asyncio.gather(*map(cluster.answer, requests))
            stats = [await cluster.stats(name) for name in cluster.workers]
            return answers, stats

    answers, stats = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert sum(each.num_preemptions for each in stats) > 0
    assert all(each.num_generated_tokens > 0 for each in stats), "every worker took part"


def test_a_full_queue_refuses(folder):
    config = make_config(folder, kv_bytes=POOL_BYTES, max_waiting=4)
    requests = [make_request(f"r{n}", make_prompt(n, 150)) for n in range(24)]

    async def scenario():
        async with start_cluster(config) as cluster:
            return await asyncio.gather(*map(cluster.answer, requests), return_exceptions=True)

    answers = asyncio.run(scenario())
    refused = [answer for answer in answers if isinstance(answer, QueueFullError)]
    assert 0 < len(refused) < len(requests)
    assert {to_api_error(error).status for error in refused} == {429}
    for answer, expected in zip(answers, generate_alone(config, requests), strict=True):
        assert isinstance(answer, QueueFullError) or answer == expected


@pytest.mark.parametrize(
    "prompt, params, param",
    [
        ([], GREEDY, "prompt"),
        ([300], GREEDY, "prompt"),
        ([1] * 1024, GREEDY, "prompt"),
        ([1], replace(GREEDY, n=17), "n"),
        ([1], replace(GREEDY, top_p=0.0), "top_p"),
    ],
)
def test_what_cannot_be_served_is_refused(folder, prompt, params, param):
    async def scenario():
        async with start_cluster(make_config(folder)) as cluster:
            with pytest.raises(RequestError) as caught:
                await cluster.answer(make_request("r", prompt, params))
            return caught.value.param

    assert asyncio.run(scenario()) == param


def test_a_poll_outlives_its_router_and_takes_nothing_with_it(folder):
    """A router was killed while its poll waited; the first token of the next router's request is for that one."""

    async def scenario():
        worker = ServingWorker("decode-0", "decode", make_config(folder))
        try:
            await worker.start()
            await worker.reset("first")
            old = asyncio.create_task(worker.poll(5.0, "first"))
            await asyncio.sleep(0.05)
            await worker.reset("second")
            new = asyncio.create_task(worker.poll(5.0, "second"))
            await asyncio.sleep(0.05)
            worker.post([OutputDelta("r", 0, (7,), "a")])
            with pytest.raises(LongctxError, match="another router"):
                await old
            with pytest.raises(LongctxError, match="another router"):  # one that was on its way meanwhile
                await worker.poll(0.0, "first")
            return (await new).deltas
        finally:
            await worker.close()

    assert [delta.token_ids for delta in asyncio.run(scenario())] == [(7,)]
