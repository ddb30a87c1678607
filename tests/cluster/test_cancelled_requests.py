"""A request that is cancelled, wherever it stands, frees its pages at every worker at once, and nobody else notices."""

import asyncio
from dataclasses import replace

import pytest

from tests.cluster.small_cluster import TRANSPORTS, generate_alone, make_config, make_prompt, start_cluster, wait_until
from tests.cluster.worker_process import open_worker
from tests.longctx.engines import GREEDY, make_request
from tests.tiny_checkpoints import make_checkpoint

LONG = 1500
ENDLESS = replace(GREEDY, max_tokens=None)  # 500 tokens more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama", max_position_embeddings=2048)


async def cancel(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def bytes_received(cluster):
    return sum(receiver.bytes_received for receiver in cluster.workers["decode-0"].decode_side.receivers.values())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_cancelled_while_the_prompt_is_computed_and_shipped(folder, transport):
    config = make_config(folder, transport=transport, max_batch_tokens=16)
    other = make_request("other", make_prompt(1, 300))

    async def scenario():
        async with start_cluster(config) as cluster:
            task = asyncio.create_task(cluster.answer(make_request("r", make_prompt(0, LONG))))
            await wait_until(lambda: bytes_received(cluster))
            assert all([(await cluster.stats(name)).num_pages_used for name in cluster.workers])
            await cancel(task)
            await cluster.wait_until_free()
            assert (await cluster.stats("decode-0")).num_generated_tokens == 0, "it was cancelled too late"
            return await cluster.answer(other)

    assert asyncio.run(scenario()) == generate_alone(config, [other])[0]


def test_cancelled_while_it_decodes(folder):
    config = make_config(folder)
    other = make_request("other", make_prompt(1, 300), replace(GREEDY, max_tokens=60))

    async def scenario():
        async with start_cluster(config) as cluster:
            neighbour = asyncio.create_task(cluster.answer(other))
            async for _ in (deltas := cluster.router.submit(make_request("r", make_prompt(0, 100), ENDLESS))):
                break
            await deltas.aclose()
            answer = await neighbour
            await cluster.wait_until_free()
            num_generated = (await cluster.stats("decode-0")).num_generated_tokens
            assert num_generated < 1000, "it went on after it was cancelled"
            return answer

    assert asyncio.run(scenario()) == generate_alone(config, [other])[0]


def test_cancelled_while_it_waits_at_the_router(folder):
    config = make_config(folder, max_batch_tokens=16)
    first = make_request("first", make_prompt(0, LONG))
    last = make_request("last", make_prompt(2, 100))

    async def scenario():
        async with start_cluster(config) as cluster:
            tasks = [asyncio.create_task(cluster.answer(first))]
            await wait_until(lambda: bytes_received(cluster))
            for request in (make_request("r", make_prompt(1, 100)), last):
                tasks.append(asyncio.create_task(cluster.answer(request)))
                await wait_until(lambda: request.request_id in cluster.router._flights)  # noqa: B023
            assert cluster.router.queue().num_waiting == 2
            await cancel(tasks.pop(1))
            assert cluster.router.queue().num_waiting == 1
            return await asyncio.gather(*tasks)

    assert asyncio.run(scenario()) == generate_alone(config, [first, last])


def test_cancelled_before_the_decode_worker_has_all(folder):
    """The prompt is computed, the decode worker frozen: the prefill worker's pages are free at once all the same."""
    config = make_config(folder, worker_timeout_s=60.0, send_timeout_s=60.0, lease_ttl_s=60.0)

    async def scenario():
        async with open_worker("decode-0", "decode", config) as decode, start_cluster(config, decode) as cluster:
            prefill = cluster.workers["prefill-0"]
            task = asyncio.create_task(cluster.answer(make_request("r", make_prompt(0, LONG))))
            await wait_until(cluster.num_shipped)
            decode.freeze()

            async def is_computed():
                return (await cluster.stats("prefill-0")).num_generated_tokens

            await wait_until(is_computed)
            assert (await cluster.stats("prefill-0")).num_pages_used > 0
            await cancel(task)
            await cluster.wait_until_free()
            decode.thaw()
            other = make_request("other", make_prompt(1, 300))
            answer = await cluster.answer(other)

            async def has_freed():
                stats = await cluster.router.worker_stats()
                used = {each.name: each.engine.num_pages_used for each in stats}
                return used == {prefill.name: 0, "decode-0": 0}

            await wait_until(has_freed, 5.0)
            return answer, generate_alone(config, [other])[0]

    answer, expected = asyncio.run(scenario())
    assert answer == expected


@pytest.mark.parametrize("local_prefill_tokens", [0, 2048])
def test_cancelled_at_any_moment(folder, local_prefill_tokens):
    """After 0, 1, 2, ... turns of the event loop, then after ever longer waits: none leaks anything."""
    config = make_config(folder, local_prefill_tokens=local_prefill_tokens, lease_ttl_s=60.0)
    last = make_request("last", make_prompt(0, 300))

    async def scenario():
        async with start_cluster(config) as cluster:
            for num_turns in range(40):
                request = make_request(f"r{num_turns}", make_prompt(num_turns, 300), ENDLESS)
                task = asyncio.create_task(cluster.answer(request))
                for _ in range(num_turns):
                    await asyncio.sleep(0 if num_turns < 20 else 0.001)
                await cancel(task)
                await cluster.wait_until_free()
            return await cluster.answer(last)

    assert asyncio.run(scenario()) == generate_alone(config, [last])[0]


def test_many_cancelled_among_many(folder):
    config = make_config(folder, kv_bytes=str(110 * 8192), num_decode=2, num_prefill=2)
    requests = [make_request(f"r{n}", make_prompt(n, 20 + 20 * n), replace(GREEDY, max_tokens=60)) for n in range(24)]

    async def scenario():
        async with start_cluster(config) as cluster:
            tasks = [asyncio.create_task(cluster.answer(request)) for request in requests]
            for number, task in enumerate(tasks):
                if number % 2:
                    await asyncio.sleep(0.03)
                    task.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(scenario())
    assert sum(isinstance(answer, asyncio.CancelledError) for answer in answers) > 4
    for answer, expected in zip(answers, generate_alone(config, requests), strict=True):
        assert isinstance(answer, asyncio.CancelledError) or answer == expected
