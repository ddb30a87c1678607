"""Workers die (SIGKILL) or freeze (SIGSTOP) in processes of their own: right text or a clear error, never a hang."""

import asyncio
from dataclasses import replace

import pytest

from cluster.openai_errors import to_api_error
from cluster.serving import NotReadyError
from tests.cluster.small_cluster import (
    TRANSPORTS,
    WAIT_S,
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

LONG = 2000  # tokens: more than a hundred steps of ``SMALL_STEPS``
SMALL_STEPS = 16  # tokens
HITS = ("kill", "freeze")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama", max_position_embeddings=8192)


@pytest.fixture(scope="module")
def expected(folder):
    return generate_alone(make_config(folder), [make_request("r", make_prompt(0, LONG))])[0]


async def stats_of(cluster, name):
    """As last heard."""
    return next(stats for stats in await cluster.router.worker_stats() if stats.name == name)


async def is_idle(cluster, name):
    """Whether the worker has done something, and holds nothing any more."""
    engine = (await stats_of(cluster, name)).engine
    return engine.num_generated_tokens and not engine.num_pages_used and not engine.num_running


async def is_lost(cluster, name):
    return not next(worker.ready for worker in (await cluster.router.health()).workers if worker.name == name)


@pytest.mark.parametrize("hit, transport", list(zip(HITS, TRANSPORTS, strict=True)))  # fault_matrix.py has them all
def test_prefill_worker_is_lost_while_it_ships(folder, expected, transport, hit):
    config = make_config(folder, transport=transport, max_batch_tokens=SMALL_STEPS)

    async def scenario():
        async with open_worker("prefill-0", "prefill", config) as prefill, start_cluster(config, prefill) as cluster:
            task = asyncio.create_task(cluster.answer(make_request("r", make_prompt(0, LONG))))
            receiver = cluster.workers["decode-0"].decode_side.receivers[transport]
            await wait_until(lambda: receiver.bytes_received)
            getattr(prefill, hit)()
            assert receiver.num_leases == 1, "the prompt was shipped before the worker was hit"
            answer = await task
            health = await cluster.router.health()
            await cluster.wait_until_free()
            return answer, {worker.name: worker.ready for worker in health.workers}

    answer, ready = asyncio.run(scenario())
    assert answer == expected
    assert ready == {"prefill-0": False, "decode-0": True}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_lease_of_a_frozen_sender_runs_out(folder, expected, transport):
    """Nobody but the lease notices: the router would wait for longer than the test."""
    config = make_config(
        folder, transport=transport, max_batch_tokens=SMALL_STEPS, lease_ttl_s=0.5, worker_timeout_s=2 * WAIT_S
    )

    async def scenario():
        async with open_worker("prefill-0", "prefill", config) as prefill, start_cluster(config, prefill) as cluster:
            task = asyncio.create_task(cluster.answer(make_request("r", make_prompt(0, LONG))))
            receiver = cluster.workers["decode-0"].decode_side.receivers[transport]
            await wait_until(lambda: receiver.bytes_received)
            prefill.freeze()
            answer = await task
            prefill.thaw()  # what it sends now is refused
            await wait_until(lambda: is_idle(cluster, "decode-0"))
            again = await cluster.answer(make_request("again", make_prompt(0, LONG)))
            return answer, [replace(delta, request_id="r") for delta in again]

    assert asyncio.run(scenario()) == (expected, expected)


SEEDED = replace(GREEDY, temperature=1.0, seed=7, n=2)


async def read_and_hit(cluster, request, hit):
    """All deltas of a request, each with the worker that it is from; ``hit`` is called once the first have come."""
    seen = []
    async with asyncio.timeout(WAIT_S):
        async for deltas in cluster.router.submit(request):
            if not seen:
                await hit()
            name = cluster.router.worker_of(request.request_id)
            seen += [(name, delta) for delta in deltas]
    return seen


def without_logprobs(delta):
    return replace(delta, logprobs=())


@pytest.mark.parametrize(
    "hit, params",
    [
        ("kill", replace(GREEDY, stop=("no such text",))),
        ("freeze", SEEDED),
        ("kill", replace(SEEDED, logprobs=1)),
        ("freeze", replace(SEEDED, seed=None)),
    ],
    ids=["greedy", "seeded", "logprobs", "without a seed"],
)
def test_a_text_that_has_begun_goes_on_elsewhere(folder, hit, params):
    config = make_config(folder, num_decode=2, worker_timeout_s=1.0)
    request = make_request("r", make_prompt(0, 100), replace(params, max_tokens=400))
    seeds = []

    async def scenario():
        async with open_worker("decode-0", "decode", config) as decode, start_cluster(config, decode) as cluster:

            async def strike():
                assert cluster.router.worker_of("r") == "decode-0"
                seeds.append(cluster.router._flights["r"].request.sampling.seed)  # the router's if it had none
                getattr(decode, hit)()

            seen = await read_and_hit(cluster, request, strike)
            return seen, (await cluster.stats("decode-1")).num_generated_tokens

    seen, num_generated = asyncio.run(scenario())
    assert num_generated == sum(len(delta.token_ids) for name, delta in seen if name == "decode-1"), "nothing twice"
    assert {name for name, _ in seen} == {"decode-0", "decode-1"}
    request = replace(request, sampling=replace(request.sampling, seed=seeds[0]))
    got, alone = join([delta for _, delta in seen]), generate_alone(config, [request])[0]
    assert [without_logprobs(delta) for delta in got] == [without_logprobs(delta) for delta in alone]
    for delta, other in zip(got, alone, strict=True):
        assert [entry.logprob for entry in delta.logprobs] == pytest.approx(
            [entry.logprob for entry in other.logprobs], abs=1e-5
        )


def test_two_losses_cost_no_token(folder):
    config = make_config(folder, num_decode=3, worker_timeout_s=1.0)
    request = make_request("r", make_prompt(0, 100), replace(GREEDY, n=2, max_tokens=400))

    async def scenario():
        async with (
            open_worker("decode-0", "decode", config) as first,
            open_worker("decode-1", "decode", config) as second,
            start_cluster(config, first, second) as cluster,
        ):
            seen, lost = [], set()
            async with asyncio.timeout(WAIT_S):
                async for deltas in cluster.router.submit(request):
                    seen.extend(deltas)
                    name = cluster.router.worker_of("r")
                    if name in ("decode-0", "decode-1") and name not in lost:
                        lost.add(name)
                        (first if name == "decode-0" else second).kill()
            return join(seen), lost

    answer, lost = asyncio.run(scenario())
    assert answer == generate_alone(config, [request])[0]
    assert len(lost) == 2


def test_the_only_decode_worker_is_waited_for(folder):
    """By what was accepted; who comes meanwhile is told at once."""
    config = make_config(folder, recovery_timeout_s=WAIT_S)
    request = make_request("r", make_prompt(0, 100), replace(GREEDY, max_tokens=400))

    async def scenario():
        async with open_worker("decode-0", "decode", config) as decode, start_cluster(config, decode) as cluster:

            async def strike():
                decode.kill()

            reading = asyncio.create_task(read_and_hit(cluster, request, strike))
            await wait_until(lambda: is_lost(cluster, "decode-0"))
            with pytest.raises(NotReadyError, match=r"no decode worker is ready \(decode-0"):
                await cluster.answer(make_request("other", make_prompt(1, 100)))
            assert not reading.done()
            await decode.restart()
            return join([delta for _, delta in await reading])

    assert asyncio.run(scenario()) == generate_alone(config, [request])[0]


def test_nobody_is_left(folder):
    """Several wait together, no longer than one."""
    config = make_config(folder, recovery_timeout_s=4.0)
    params = replace(GREEDY, max_tokens=8000)
    requests = [make_request(f"r{n}", make_prompt(n, 100), params) for n in range(6)]

    async def scenario():
        seen = {request.request_id: [] for request in requests}

        async def read(cluster, request):
            async for deltas in cluster.router.submit(request):
                seen[request.request_id] += deltas

        async with open_worker("decode-0", "decode", config) as decode, start_cluster(config, decode) as cluster:
            reading = [asyncio.create_task(read(cluster, request)) for request in requests]
            await wait_until(lambda: all(seen.values()))
            decode.kill()
            async with asyncio.timeout(16.0):  # one after another they would take 24
                errors = await asyncio.gather(*reading, return_exceptions=True)
            return seen, errors

    seen, errors = asyncio.run(scenario())
    for request, error in zip(requests, errors, strict=True):
        assert isinstance(error, NotReadyError)
        assert "no decode worker is ready (decode-0" in str(error)
        assert to_api_error(error).status == 503
        told = join(seen[request.request_id])[0].token_ids
        alone = generate_alone(config, [replace(request, sampling=replace(GREEDY, max_tokens=len(told)))])[0][0]
        assert told == alone.token_ids, "what came before the loss is right"


def test_a_thawed_worker_comes_back_and_has_forgotten(folder):
    config = make_config(folder, max_batch_tokens=SMALL_STEPS)
    request = make_request("r", make_prompt(0, 500))

    async def scenario():
        async with open_worker("decode-0", "decode", config) as decode, start_cluster(config, decode) as cluster:
            task = asyncio.create_task(cluster.answer(make_request("lost", make_prompt(1, LONG))))
            await wait_until(cluster.num_shipped)
            decode.freeze()
            with pytest.raises(NotReadyError):
                await task
            decode.thaw()
            await cluster.wait_until_ready()
            answer = await cluster.answer(request)
            await wait_until(lambda: is_idle(cluster, "decode-0"))
            return answer

    assert asyncio.run(scenario()) == generate_alone(config, [request])[0]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_restarted_worker_is_used_again(folder, role):
    config = make_config(folder)
    requests = [make_request(f"r{n}", make_prompt(n, 100)) for n in range(2)]

    async def scenario():
        name = f"{role}-0"
        async with open_worker(name, role, config) as process, start_cluster(config, process) as cluster:
            first = await cluster.answer(requests[0])
            process.kill()

            await wait_until(lambda: is_lost(cluster, name))
            await process.restart()
            await cluster.wait_until_ready()
            second = await cluster.answer(requests[1])
            await wait_until(lambda: is_idle(cluster, name))
            return [first, second], await stats_of(cluster, name)

    answers, stats = asyncio.run(scenario())
    assert answers == generate_alone(config, requests)
    assert stats.engine.num_generated_tokens == (1 if role == "prefill" else GREEDY.max_tokens - 1)
