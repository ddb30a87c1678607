"""The engine equals transformers and itself, whatever shares its batches, pages and steps."""

import random
from dataclasses import replace

import pytest

from longctx.errors import QueueFullError, RequestError
from longctx.messages import SamplingParams
from tests.longctx.engines import GREEDY, check_pages, collect, generate, make_engine, make_request, run
from tests.longctx.greedy import generate_reference
from tests.tiny_checkpoints import make_checkpoint

NUM_NEW = 24
LENGTHS = (5, 64, 37, 16, 130, 1, 63, 90)


def random_prompt(seed, length):
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def prompts():
    return [random_prompt(seed, length) for seed, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def reference(folder, prompts):
    return generate_reference(folder, prompts, num_new=NUM_NEW)


CONFIGS = {
    "default": {},
    "torch": {"attention": "torch"},
    "chunked": {"page_size": 16, "max_batch_tokens": 16},
    "tiny_pages": {"attention": "torch", "page_size": 3, "max_batch_tokens": 40},
    "no_cache": {"prefix_cache": False, "page_size": 16},
    "few_sequences": {"max_sequences": 3, "page_size": 16},
    "tiny_pool": {"attention": "torch", "page_size": 4, "num_pages": 50, "max_batch_tokens": 64},
    "tiny_pool_no_cache": {"attention": "torch", "page_size": 4, "num_pages": 50, "prefix_cache": False},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers(folder, prompts, reference, name):
    engine = make_engine(folder, **CONFIGS[name])
    outputs = generate(engine, [make_request(str(i), prompt) for i, prompt in enumerate(prompts)])
    assert [outputs[str(i), 0] for i in range(len(prompts))] == reference
    stats = engine.stats()
    assert (stats.num_preemptions > 0) == name.startswith("tiny_pool")
    assert stats.num_prompt_tokens == sum(LENGTHS)
    assert stats.num_waiting == stats.num_running == stats.pending_prefill_tokens == 0


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_families_through_the_engine(tmp_path, family):
    folder = make_checkpoint(tmp_path / family, family)
    prompts = [random_prompt(seed, length) for seed, length in enumerate((70, 20, 100))]
    engine = make_engine(folder, page_size=16, max_batch_tokens=32)
    outputs = generate(engine, [make_request(str(i), prompt) for i, prompt in enumerate(prompts)])
    assert [outputs[str(i), 0] for i in range(3)] == generate_reference(folder, prompts, num_new=NUM_NEW)


ROPES = {
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + i / 10 for i in range(8)],
            "long_factor": [2.0 + i for i in range(8)],
            "original_max_position_embeddings": 64,
        },
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_length_dependent_rope(tmp_path, name):
    """Prompts before, at and beyond the length where angles change; twice, so that the second time pages are shared."""
    family, rope = ROPES[name]
    sizes = {"max_position_embeddings": 64} if name == "dynamic" else {"max_position_embeddings": 256}
    if name == "longrope":
        sizes["original_max_position_embeddings"] = 64
    folder = make_checkpoint(tmp_path / name, family, rope_parameters=rope, **sizes)
    tokens = random_prompt(1, 90)
    prompts = [tokens[:n] for n in (30, 50, 63, 64, 65, 90)]
    engine = make_engine(folder, page_size=16, max_batch_tokens=48)
    expected = generate_reference(folder, prompts, num_new=NUM_NEW)
    for turn in range(2):
        requests = [make_request(f"{turn}-{i}", prompt) for i, prompt in enumerate(prompts)]
        fits = [len(p) + NUM_NEW <= engine.max_context for p in prompts]
        outputs = generate(engine, requests)
        for i, ids in enumerate(expected):
            assert outputs[f"{turn}-{i}", 0] == ids[: NUM_NEW if fits[i] else engine.max_context - len(prompts[i])]
    assert engine.stats().num_cached_tokens > 0


def test_prefixes_are_shared_and_change_nothing(folder):
    prefix = random_prompt(7, 100)
    prompts = [[*prefix, *random_prompt(i, 20)] for i in range(5)]
    plain = make_engine(folder, prefix_cache=False, page_size=16)
    expected = generate(plain, [make_request(str(i), prompt) for i, prompt in enumerate(prompts)])
    engine = make_engine(folder, page_size=16, max_batch_tokens=64)
    assert generate(engine, [make_request(str(i), prompt) for i, prompt in enumerate(prompts)]) == expected
    assert engine.stats().num_cached_tokens >= 4 * 96 - 64  # found while the first one was still being computed
    engine.add(make_request("again", prompts[0]))
    deltas = run(engine)
    assert deltas[0].num_cached_tokens == deltas[-1].num_cached_tokens == 112  # 7 pages; the last token is computed
    assert deltas[0].num_prompt_tokens == 120
    assert collect(deltas)["again", 0] == expected["0", 0]
    engine.add(make_request("salted", prompts[0], cache_salt="tenant"))
    assert run(engine)[0].num_cached_tokens == 0


def test_outputs_become_part_of_the_prefix(folder):
    engine = make_engine(folder, page_size=16)
    prompt = random_prompt(3, 40)
    first = generate(engine, [make_request("a", prompt)])["a", 0]
    engine.add(make_request("b", [*prompt, *first, 1, 2, 3]))
    assert run(engine)[0].num_cached_tokens == 48  # 40 + 23 tokens were computed: three full pages


SAMPLED = SamplingParams(temperature=0.9, seed=11, max_tokens=20, ignore_eos=True, n=4)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
def test_n_sequences_fork_from_one_prompt(folder, length):
    engine = make_engine(folder, page_size=16)
    prompt = random_prompt(length, length)
    outputs = generate(engine, [make_request("a", prompt, SAMPLED)])
    sequences = [outputs["a", index] for index in range(4)]
    assert len({tuple(sequence) for sequence in sequences}) == 4
    assert engine.stats().num_prompt_tokens == length
    # The same seed gives the same first sequence without forking, and every sequence starts from the right KV.
    assert generate(engine, [make_request("b", prompt, replace(SAMPLED, n=1))])["b", 0] == sequences[0]
    greedy = generate(engine, [make_request("c", prompt, replace(GREEDY, n=3, max_tokens=10))])
    assert greedy["c", 0] == greedy["c", 1] == greedy["c", 2]
    assert greedy["c", 0] == generate(engine, [make_request("d", prompt)])["d", 0][:10]


@pytest.mark.parametrize("options", [{"page_size": 16}, {"attention": "torch", "page_size": 4, "num_pages": 24}])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_seed_gives_the_same_tokens_in_company(folder, options, prefix_cache):
    prompt = random_prompt(5, 30)
    alone = generate(make_engine(folder, page_size=16), [make_request("a", prompt, SAMPLED)])
    engine = make_engine(folder, prefix_cache=prefix_cache, **options)
    others = [
        make_request(f"o{i}", random_prompt(i, 9 * i + 1), SamplingParams(seed=i, max_tokens=15, ignore_eos=True))
        for i in range(6)
    ]
    together = generate(engine, [*others[:3], make_request("a", prompt, SAMPLED), *others[3:]])
    assert {key: ids for key, ids in together.items() if key[0] == "a"} == alone
    assert (engine.stats().num_preemptions > 0) == ("num_pages" in options)


def test_a_request_without_seed_gets_a_random_one(folder):
    engine = make_engine(folder)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    outputs = generate(engine, [make_request(str(i), [1, 2, 3], params) for i in range(4)])
    assert len({tuple(ids) for ids in outputs.values()}) > 1


def test_finish_reasons_and_counts(folder, prompts, reference):
    engine = make_engine(folder)
    stop_id = reference[1][6]
    first_at = reference[1].index(stop_id)
    engine.add(make_request("stop", prompts[1], replace(GREEDY, stop_token_ids=(stop_id,))))
    engine.add(make_request("length", prompts[1], replace(GREEDY, max_tokens=1)))
    deltas = run(engine)
    last = {delta.request_id: delta for delta in deltas}
    assert (last["stop"].finish_reason, last["stop"].stop_reason) == ("stop", stop_id)
    assert collect(deltas)["stop", 0] == reference[1][: first_at + 1]
    assert (last["length"].finish_reason, last["length"].token_ids) == ("length", (reference[1][0],))
    assert [delta.finish_reason for delta in deltas].count(None) == first_at
    assert engine.stats().num_generated_tokens == first_at + 2


def test_cancelling_frees_pages_at_once(folder):
    engine = make_engine(folder, page_size=16, max_batch_tokens=32, prefix_cache=False)
    for i in range(4):
        engine.add(make_request(str(i), random_prompt(i, 60), replace(SAMPLED, n=2)))
    seen = set()
    for cancel_after in (1, 3, 5, 9):
        for _ in range(cancel_after):
            seen |= {delta.request_id for delta in engine.step()}
        used = engine.stats().num_pages_used
        victim = str({1: 3, 3: 0, 5: 1, 9: 2}[cancel_after])  # one waits, one is being computed, others decode
        engine.cancel(victim)
        check_pages(engine)
        assert victim == "3" or engine.stats().num_pages_used < used
        assert victim not in {delta.request_id for delta in engine.step()}
    engine.cancel("3")
    engine.cancel("never there")
    assert not engine.has_work
    assert engine.stats().num_pages_used == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_workloads_lose_no_page(folder, seed):
    rng = random.Random(seed)
    pool = {"page_size": 4, "num_pages": 60, "attention": "torch"} if seed % 2 else {"page_size": 16}
    engine = make_engine(folder, max_sequences=6, max_batch_tokens=48, prefix_cache=seed != 3, **pool)
    expected, finished, cancelled = {}, set(), set()
    prefix = random_prompt(99, 40)
    for i in range(40):
        prompt = prefix[: rng.choice([0, 20, 40])] + random_prompt(i, rng.randrange(1, 60))
        params = SamplingParams(seed=i, n=rng.choice([1, 1, 3]), max_tokens=rng.randrange(1, 30), ignore_eos=True)
        engine.add(make_request(str(i), prompt, params))
        expected[str(i)] = params.n
        for _ in range(rng.randrange(4)):
            finished |= {(d.request_id, d.index) for d in engine.step() if d.finish_reason}
            check_pages(engine)
        if rng.random() < 0.2:
            cancelled.add(victim := str(rng.randrange(i + 1)))
            engine.cancel(victim)
            check_pages(engine)
    finished |= {(d.request_id, d.index) for d in run(engine) if d.finish_reason}
    for request_id, num_sequences in expected.items():
        if request_id not in cancelled:
            assert {(request_id, index) for index in range(num_sequences)} <= finished
    stats = engine.stats()
    assert stats.num_pages_used == 0 and (stats.num_preemptions > 0) == bool(seed % 2)


def test_the_oldest_decode_goes_on_while_a_long_prompt_is_computed(folder):
    engine = make_engine(folder, page_size=16, max_batch_tokens=64)
    engine.add(make_request("decode", [1, 2, 3]))
    engine.step()
    engine.add(make_request("long", random_prompt(0, 160)))
    while engine.progress("long")[0] < 160:
        before = engine.progress("long")[0]
        assert "decode" in {delta.request_id for delta in engine.step()}
        assert engine.progress("long")[0] - before == 16  # a quarter of a step


# Limits


def test_context_limit_exactly_and_one_over(folder):
    engine = make_engine(folder, page_size=16, max_context=64)
    outputs = generate(engine, [make_request("a", random_prompt(0, 63)), make_request("b", random_prompt(1, 60))])
    assert len(outputs["a", 0]) == 1 and len(outputs["b", 0]) == 4  # max_tokens is clipped
    with pytest.raises(RequestError, match="the prompt has 64 tokens; the context is 64 tokens") as caught:
        engine.add(make_request("c", random_prompt(2, 64)))
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_a_pool_smaller_than_the_context(folder):
    engine = make_engine(folder, attention="torch", page_size=4, num_pages=8)
    assert engine.max_context == 32
    unlimited = replace(GREEDY, max_tokens=None)
    outputs = generate(engine, [make_request(str(i), random_prompt(i, 10), unlimited) for i in range(3)])
    assert [len(ids) for ids in outputs.values()] == [22, 22, 22]
    with pytest.raises(RequestError, match=r"do not fit the KV budget, engine\.kv_bytes"):
        engine.add(make_request("x", random_prompt(0, 32)))


BAD_REQUESTS = {
    "empty": ([], GREEDY, "the prompt is empty", "prompt"),
    "negative": ([1, -1], GREEDY, "token id -1 at position 1", "prompt"),
    "too_large": ([260], GREEDY, "token id 260 at position 0 is not allowed: 0 to 259", "prompt"),
    "huge": ([1 << 70], GREEDY, "must be integers from 0 to 259", "prompt"),
    "fraction": ([1.5], GREEDY, "must be integers", "prompt"),
    "text": (["a"], GREEDY, "must be integers", "prompt"),
    "no_tokens": ([1], replace(GREEDY, max_tokens=0), "max_tokens", "max_tokens"),
    "many": ([1], replace(GREEDY, n=17), "n=17 .* at most 16", "n"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_refused_and_take_nothing(folder, name):
    prompt, params, message, param = BAD_REQUESTS[name]
    engine = make_engine(folder)
    for refuse in (engine.add, engine.reserve):
        with pytest.raises(RequestError, match=message) as caught:
            refuse(make_request("x", prompt, params))
        assert caught.value.param == param
    assert not engine.has_work and engine.stats().num_waiting == 0


def test_a_full_queue_and_a_used_id_are_refused(folder):
    engine = make_engine(folder, max_waiting=2)
    engine.add(make_request("a", [1]))
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add(make_request("a", [1]))
    engine.add(make_request("b", [1]))
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        engine.add(make_request("c", [1]))
    run(engine)
    engine.add(make_request("c", [1]))


def test_a_failing_step_ends_what_is_in_flight(folder, monkeypatch):
    engine = make_engine(folder)
    engine.add(make_request("a", [1, 2], replace(GREEDY, n=2)))
    engine.add(make_request("b", [1, 2]))
    monkeypatch.setattr(engine.decoder, "forward", lambda batch: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        engine.step()
    deltas = engine.fail_all("broken")
    assert {(d.request_id, d.index, d.finish_reason, d.error) for d in deltas} == {
        ("a", 0, "error", "broken"), ("a", 1, "error", "broken"), ("b", 0, "error", "broken"),
    }  # fmt: skip
    check_pages(engine)
    assert engine.stats().num_pages_used == 0 and not engine.has_work
    monkeypatch.undo()
    assert len(generate(engine, [make_request("c", [1, 2])])["c", 0]) == NUM_NEW
