"""Workers of several ranks behind the router: the same text, KV shipped by each rank, and a lost rank costs time."""

import asyncio
import random

import pytest

from longctx.messages import SamplingParams
from tests.cluster.small_cluster import generate_alone, make_config, make_prompt, start_cluster, wait_until
from tests.longctx.engines import GREEDY, make_request
from tests.tiny_checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


def make_requests(*, lengths=(200, 33, 90, 150), params=GREEDY):
    return [make_request(f"r{seed}", make_prompt(seed, length), params) for seed, length in enumerate(lengths)]


@pytest.mark.parametrize("transport", ["tcp", "shared_memory"])
@pytest.mark.parametrize(("prefill_ranks", "decode_ranks"), [(3, 1), (1, 2), (2, 3)])
def test_text_is_that_of_one_engine(folder, transport, prefill_ranks, decode_ranks):
    config = make_config(folder, transport=transport, prefill_ranks=prefill_ranks, decode_ranks=decode_ranks)
    requests = make_requests()
    expected = generate_alone(config, requests)

    async def serve():
        async with start_cluster(config) as cluster:
            answers = await asyncio.gather(*(cluster.answer(request) for request in requests))
            worker = cluster.workers["prefill-0"]
            own = [sum(sender.bytes_shipped for sender in worker._prefill.senders.values())]
            own += [sum(s.bytes_shipped for s in rank._senders.values()) for rank in cluster.ranks["prefill-0"]]
            return answers, own

    answers, shipped = asyncio.run(serve())
    assert answers == expected
    assert len(shipped) == prefill_ranks
    assert min(shipped) > 0.5 * max(shipped), shipped  # each ships its own share


def test_ranks_under_cca_ship_once(tmp_path):
    """Every rank has all of it: rank 0 ships, the others say that they are done."""
    entry = {"name": "cca", "group_size": 4, "window": 20}
    config = make_config(make_checkpoint(tmp_path, "llama", longctx_attention=entry), prefill_ranks=2)
    requests = make_requests()
    expected = generate_alone(config, requests)

    async def serve():
        async with start_cluster(config) as cluster:
            answers = await asyncio.gather(*(cluster.answer(request) for request in requests))
            (rank,) = cluster.ranks["prefill-0"]
            return answers, [sender.bytes_shipped for sender in rank._senders.values()]

    answers, shipped = asyncio.run(serve())
    assert [[d.token_ids for d in answer] for answer in answers] == [[d.token_ids for d in e] for e in expected]
    assert shipped == [0]


@pytest.mark.parametrize(
    ("prefill_ranks", "decode_ranks"), [(2, 1), (1, 3), pytest.param(3, 2, marks=pytest.mark.slow)]
)
def test_landmarks_are_found_by_every_rank(tmp_path, prefill_ranks, decode_ranks):
    """Also those of pages that were sent to another rank, and of a prefix that was sent for an earlier request."""
    method = {"name": "landmark", "block_size": 16, "landmark_token_id": 258}
    folder = make_checkpoint(tmp_path / "model", "llama", longctx_attention=method)
    config = make_config(folder, prefill_ranks=prefill_ranks, decode_ranks=decode_ranks, attention="native")
    prefix = make_prompt(9, 160)
    later = [make_request(f"p{seed}", prefix + make_prompt(seed, length)) for seed, length in ((1, 5), (2, 20))]
    requests = make_requests(lengths=(33, 90))
    expected = generate_alone(config, [*requests, *later])

    async def serve():
        async with start_cluster(config) as cluster:
            answers = await asyncio.gather(*(cluster.answer(request) for request in requests))
            return [*answers, *[await cluster.answer(request) for request in later]], cluster.num_shipped()

    answers, num_shipped = asyncio.run(serve())
    assert answers == expected
    assert num_shipped > 0


def test_a_cached_prefix_is_shipped_by_those_who_hold_it(folder):
    prefix = make_prompt(1, 160)
    config = make_config(folder, prefill_ranks=2, num_decode=2)
    requests = [make_request(f"r{i}", prefix + make_prompt(10 + i, 20 + 30 * i)) for i in range(4)]
    expected = generate_alone(config, requests)

    async def serve():
        async with start_cluster(config) as cluster:
            return [await cluster.answer(request) for request in requests]

    assert asyncio.run(serve()) == expected


def test_sampling_and_several_sequences(folder):
    params = SamplingParams(n=3, temperature=0.9, seed=5, max_tokens=20, ignore_eos=True, logprobs=2)
    config = make_config(folder, prefill_ranks=2, decode_ranks=2)
    requests = make_requests(lengths=(70, 130), params=params)
    expected = generate_alone(config, requests)

    async def serve():
        async with start_cluster(config) as cluster:
            return [await cluster.answer(request) for request in requests]

    for answer, wanted in zip(asyncio.run(serve()), expected, strict=True):
        for delta, other in zip(answer, wanted, strict=True):
            assert delta.token_ids == other.token_ids
            assert delta.text == other.text


def test_prompts_are_computed_where_they_are_decoded_over_all_ranks(folder):
    config = make_config(folder, num_prefill=0, decode_ranks=3)
    requests = make_requests()
    expected = generate_alone(config, requests)

    async def serve():
        async with start_cluster(config) as cluster:
            return await asyncio.gather(*(cluster.answer(request) for request in requests))

    assert asyncio.run(serve()) == expected


def test_requests_are_cancelled_at_any_moment(folder):
    """Afterwards no page, lease or stream is left at any rank; ``start_cluster`` checks."""
    config = make_config(folder, prefill_ranks=2, decode_ranks=2, max_batch_tokens=16)
    rng = random.Random(3)

    async def serve():
        async with start_cluster(config) as cluster:

            async def begin_and_leave(request, delay):
                task = asyncio.ensure_future(cluster.generate(request))
                await asyncio.sleep(delay)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

            requests = make_requests(lengths=[rng.randint(40, 300) for _ in range(16)])
            await asyncio.gather(*(begin_and_leave(request, rng.uniform(0, 0.4)) for request in requests))
            await cluster.wait_until_free(10.0)
            last = make_request("last", make_prompt(99, 100))
            assert await cluster.answer(last) == generate_alone(config, [last])[0]

    asyncio.run(serve())


@pytest.mark.parametrize("rank", [1, 2])
def test_a_lost_prefill_rank_costs_time_not_the_answer(folder, rank):
    config = make_config(folder, prefill_ranks=3, max_batch_tokens=16)
    requests = make_requests(lengths=(400, 300, 200))
    expected = generate_alone(config, requests)

    async def serve():
        async with start_cluster(config) as cluster:
            answers = asyncio.gather(*(cluster.answer(request) for request in requests))
            await wait_until(lambda: cluster.num_shipped() > 0)
            cluster.ranks["prefill-0"][rank - 1]._group.close()
            result = await answers
            health = await cluster.router.health()
            cluster.workers.pop("prefill-0")  # it is of no more use
            return result, health

    answers, health = asyncio.run(serve())
    assert answers == expected
    assert health.ready
    assert "prefill-0" in health.reason


def test_a_worker_whose_engine_thread_failed_is_lost(folder, caplog):
    config = make_config(folder)
    requests = make_requests()
    expected = generate_alone(config, requests)

    async def serve():
        async with start_cluster(config) as cluster:
            cluster.workers["prefill-0"].engine.keep_alive = lambda: 1 / 0
            await wait_until(lambda: "the engine cannot go on" in caplog.text)
            answers = await asyncio.gather(*(cluster.answer(request) for request in requests))
            health = await cluster.router.health()
            cluster.workers.pop("prefill-0")
            return answers, health

    answers, health = asyncio.run(serve())
    assert answers == expected
    assert "prefill-0: prefill-0 is lost: division by zero" in health.reason
    assert "ZeroDivisionError" in caplog.text
