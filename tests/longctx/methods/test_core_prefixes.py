"""engine.prefix_folder under CCA: a sequence goes on behind any page that is stored, as if it had been computed."""

import random
from dataclasses import replace

import pytest

from longctx.attention.config import AttentionConfig
from longctx.messages import AttentionOptions, SamplingParams
from tests.longctx.engines import check_pages, collect, make_engine, make_request, run
from tests.longctx.methods.test_cca_engine import PARAMS, SMALL, SPEC, with_sizes
from tests.longctx.sharded_engine import sharded_engine
from tests.tiny_checkpoints import make_checkpoint

METHOD = AttentionConfig(name="cca", group_size=SPEC.group_size, window=SPEC.window)
FETCH = replace(METHOD, core_fetch=2)
GREEDY = replace(PARAMS, logprobs=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def open_engine(folder, store, method=METHOD, **options):
    options = SMALL | {"attention": "torch", "prefix_folder": None if store is None else str(store)} | options
    return make_engine(folder, method=method, **options)


def make_prompt(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def answer(engine, prompt, params=GREEDY, **fields):
    engine.add(make_request("r", prompt, params, **fields))
    deltas = run(engine)
    assert engine.stats().num_pages_used == 0
    return collect(deltas), deltas[0].num_cached_tokens


@pytest.mark.parametrize("method", [METHOD, FETCH, replace(FETCH, blocks="file")], ids=["cores", "fetch", "file"])
@pytest.mark.parametrize("sizes", [(5, 9), (16, 40), (24, 24), (1, 1)])
def test_what_another_engine_stored_is_gone_on_with(folder, tmp_path, method, sizes):
    """At every length modulo the page: prompts that are whole there, that part from it, and that go on behind it."""
    params, document = with_sizes(*sizes, GREEDY), make_prompt(200)
    alone = open_engine(folder, None, method)
    engine = open_engine(folder, tmp_path, method)
    expected = answer(alone, document, params)
    assert answer(engine, document, params) == expected
    engine.close()
    engine = open_engine(folder, tmp_path, method)
    assert answer(engine, document, params) == (expected[0], 192)
    for length in (1, 16, 17, 47, 48, 111, 130, 199):
        prompt = document[:length] + make_prompt(length % 7, seed=length)
        tokens, num_cached = answer(engine, prompt, params)
        assert tokens == answer(alone, prompt, params)[0]
        assert (min(length, len(prompt) - 1)) // 16 * 16 <= num_cached < len(prompt)
    engine.close()


def test_what_was_decoded_is_found_too(folder, tmp_path):
    prompt, params = make_prompt(50), replace(GREEDY, max_tokens=90)
    engine = open_engine(folder, tmp_path)
    tokens = answer(engine, prompt, params)[0]["r", 0]
    engine.close()
    engine = open_engine(folder, tmp_path)
    longer = prompt + tokens + [1, 2, 3]
    got = answer(engine, longer)
    assert got == (answer(open_engine(folder, None), longer)[0], 128)
    assert engine.stats().details["num_loaded_pages"] == 8
    engine.close()


def test_sizes_salts_and_ways_to_look_share_nothing(folder, tmp_path):
    prompt = make_prompt(100)
    engine = open_engine(folder, tmp_path)
    answer(engine, prompt)
    engine.close()
    engine = open_engine(folder, tmp_path)
    assert answer(engine, prompt, replace(GREEDY, attention=AttentionOptions(5, 10)))[1] == 0
    assert answer(engine, prompt, replace(GREEDY, attention=AttentionOptions(4, 9)))[1] == 0
    assert answer(engine, prompt, cache_salt="another's")[1] == 0
    assert answer(engine, prompt, replace(GREEDY, attention=AttentionOptions(5, 9)))[1] == 96
    engine.close()
    for method, num_cached in ((FETCH, 0), (replace(METHOD, window=11), 0), (replace(METHOD, group_size=4), 96)):
        engine = open_engine(folder, tmp_path, method)
        assert answer(engine, prompt)[1] == num_cached  # whoever named the sizes
        engine.close()


@pytest.mark.parametrize("method", [METHOD, FETCH], ids=["cores", "fetch"])
@pytest.mark.parametrize("damage", ["cores", "tokens", "gone"])
@pytest.mark.parametrize("page", [0, 5, 11])
def test_damage_costs_what_lies_behind_it(folder, tmp_path, method, damage, page):
    """Of a page whose tokens nobody sees any more, only the cores count."""
    prompt = make_prompt(200)
    engine = open_engine(folder, tmp_path, method)
    expected = answer(engine, prompt)[0]
    digests, files = find_digests(engine, prompt), engine.cache.store._files
    engine.close()
    path = files.path(digests[page])
    data = bytearray(path.read_bytes())
    data[-1 if damage == "cores" else 200] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(data)
    engine = open_engine(folder, tmp_path, method)
    is_seen = damage != "tokens" or page == 11 or method is FETCH
    assert answer(engine, prompt) == (expected, 16 * page if is_seen else 192)
    assert engine.stats().details["num_damaged_pages"] == (damage != "gone" and is_seen)
    engine.close()
    engine = open_engine(folder, tmp_path, method)
    assert answer(engine, prompt) == (expected, 192)
    engine.close()


def find_digests(engine, prompt):
    """As the scheduler names pages."""
    engine.add(make_request("names", prompt, replace(GREEDY, max_tokens=1)))
    sequence = engine._requests["names"].sequences[0]
    run(engine)
    return sequence.chain.digests


@pytest.mark.parametrize("method", [METHOD, FETCH], ids=["cores", "fetch"])
def test_small_steps_load_little_at_a_time(folder, tmp_path, method, monkeypatch):
    prompt = make_prompt(400)
    engine = open_engine(folder, tmp_path, method)
    expected = answer(engine, prompt)[0]
    engine.close()
    monkeypatch.setattr("longctx.engine.core_scheduler.LOADED_BYTES", 3000)
    engine = open_engine(folder, tmp_path, method)
    engine.add(make_request("other", make_prompt(40, seed=9), replace(GREEDY, max_tokens=60)))
    engine.step()
    engine.add(make_request("r", prompt, GREEDY))
    num_steps = 0
    while not engine._requests["r"].sequences[0].num_computed:
        engine.step()
        check_pages(engine)
        num_steps += 1
    assert num_steps > 3
    engine.add(make_request("dropped", prompt[:300], GREEDY))
    engine.step()
    engine.cancel("dropped")
    deltas = [delta for delta in run(engine) if delta.request_id == "r"]
    assert tuple(expected["r", 0])[-len(deltas) :] == tuple(token for delta in deltas for token in delta.token_ids)
    assert deltas[-1].num_cached_tokens == 384
    assert not engine._scheduler._searches
    engine.close()


@pytest.mark.parametrize("method", [METHOD, FETCH], ids=["cores", "fetch"])
def test_random_requests_over_engines_that_come_and_go(folder, tmp_path, method):
    """Forks, preemption, cancelling and several sizes, with pages that are damaged or gone meanwhile; seeded."""
    rng = random.Random(7)
    roots = [make_prompt(230, seed) for seed in range(3)]
    alone = open_engine(folder, None, method)
    num_cached = 0
    for life in range(3):
        engine = open_engine(folder, tmp_path, method, kv_bytes=str(44 * alone.pool.layout.page_bytes))
        for batch in range(2):
            requests = []
            for index in range(4):
                prompt = rng.choice(roots)[: rng.randrange(1, 230)] + make_prompt(rng.randrange(1, 30), rng.random())
                params = SamplingParams(
                    temperature=1.0, seed=1, n=rng.choice((1, 1, 2)), max_tokens=rng.randrange(1, 40), ignore_eos=True,
                    attention=rng.choice((None, AttentionOptions(7, 20))),
                )  # fmt: skip
                requests.append(make_request(f"{life}.{batch}.{index}", prompt, params))
            for request in requests:
                engine.add(request)
            engine.add(make_request("left", rng.choice(roots), GREEDY))
            for _ in range(rng.randrange(1, 6)):
                engine.step()
            engine.cancel("left")
            deltas = run(engine)
            num_cached += sum({delta.request_id: delta.num_cached_tokens for delta in deltas}.values())
            for request in requests:
                alone.add(request)
            expected, got = collect(run(alone)), collect(deltas)
            assert {name: expected[name][-len(own) :] for name, own in got.items()} == got
            for path in rng.sample(sorted(tmp_path.rglob("*.kv")), 2):
                path.unlink() if rng.random() < 0.5 else path.write_bytes(b"lctxkv02")
        engine.close()
        assert engine.stats().num_pages_used == 0
    assert num_cached > 1000


@pytest.mark.parametrize("method", [METHOD, FETCH], ids=["cores", "fetch"])
def test_ranks_load_what_one_rank_stored_and_the_other_way_round(folder, tmp_path, method):
    prompt = make_prompt(200)
    longer = prompt + make_prompt(70, seed=1)
    engine = open_engine(folder, tmp_path, method)
    expected = answer(engine, prompt)[0]
    engine.close()
    options = SMALL | {"attention": "torch", "prefix_folder": str(tmp_path)}
    with sharded_engine(folder, 2, method=method, **options) as engine:
        assert answer(engine, prompt) == (expected, 192)
        tokens = answer(engine, longer)
        assert tokens == (answer(open_engine(folder, None, method), longer)[0], 192)
    engine = open_engine(folder, tmp_path, method)
    assert answer(engine, longer) == (tokens[0], 256)
    engine.close()
