"""engine.prefix_folder for workers of several ranks: whatever ranks stored, any number of ranks go on with it."""

import random
from contextlib import contextmanager
from dataclasses import replace

import pytest

from longctx.attention.config import AttentionConfig
from tests.longctx.engines import GREEDY, check_pages, collect, make_engine, make_request, run
from tests.longctx.sharded_engine import sharded_engine
from tests.tiny_checkpoints import make_checkpoint

BLOCK = 16
LANDMARK = {"name": "landmark", "block_size": BLOCK, "landmark_token_id": 255}
NEAR = AttentionConfig(top_k=2)
HOST, FILE = (replace(NEAR, blocks=blocks, blocks_bytes="2MiB") for blocks in ("host", "file"))
STEPS = {"page_size": BLOCK, "max_batch_tokens": 32, "max_sequences": 4, "attention": "torch"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    places = tmp_path_factory.mktemp("models")
    return {
        False: make_checkpoint(places / "llama", "llama"),
        True: make_checkpoint(places / "landmark", "llama", longctx_attention=LANDMARK),
    }


def options_of(store, options):
    return STEPS | {"prefix_folder": None if store is None else str(store)} | options


@contextmanager
def open_engine(folders, store, method, world_size=1, **options):
    """With a store, unless that is None; of ranks that compute as many tokens in a step together."""
    folder, options = folders[method is not None], options_of(store, options)
    if world_size > 1:
        with sharded_engine(folder, world_size, method=method, **options) as engine:
            yield engine
    else:
        engine = make_engine(folder, method=method, **options)
        yield engine
        engine.close()


def make_prompt(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(255) for _ in range(length)]


def answer(engine, prompt, params=GREEDY):
    engine.add(make_request("r", prompt, params))
    deltas = run(engine)
    assert engine.stats().num_pages_used == 0
    return collect(deltas), deltas[0].num_cached_tokens


@pytest.mark.parametrize(
    "method, degrees",
    [(None, (2, 1)), (None, (2, 3)), (NEAR, (1, 2)), (HOST, (2, 3)), (FILE, (2, 1))],
    ids=["dense-2-1", "dense-2-3", "near-1-2", "host-2-3", "file-2-1"],
)
def test_ranks_find_what_others_stored(folders, tmp_path, method, degrees):
    """A page is whole, on whatever rank: degrees differ, and prompts are dealt out otherwise."""
    first, second = degrees
    prompt = make_prompt(200)
    longer = prompt + make_prompt(70, seed=1)
    with open_engine(folders, None, method) as alone:
        expected = [answer(alone, prompt), answer(alone, longer)[0]]
    with open_engine(folders, tmp_path, method, first) as engine:
        assert answer(engine, prompt) == expected[0]
    with open_engine(folders, tmp_path, method, second) as engine:
        assert answer(engine, longer) == (expected[1], 192)
        assert engine.stats().details["num_loaded_pages"] == 12
        assert answer(engine, prompt) == (expected[0][0], 192)
        assert answer(engine, longer) == (expected[1], 256)


@pytest.mark.parametrize("method", [None, HOST], ids=["dense", "host"])
@pytest.mark.parametrize("damage", ["flipped", "gone", "cut"])
def test_nobody_loads_past_a_page_that_one_rank_lacks(folders, tmp_path, method, damage, monkeypatch):
    """Rank 0 saw the file; the rank that is to load it finds otherwise."""
    prompt = make_prompt(200)
    with open_engine(folders, tmp_path, method, 2, max_batch_tokens=128) as engine:
        expected = answer(engine, prompt)[0]
        own, digests = engine.cache.store._own, list(engine.cache._page_of)
        pages = [engine.cache._page_of[digest] for digest in digests]
    rank_1 = next(index for index in range(2, 12) if engine.pool.rank_of(pages[index]) == 1)
    path = own._files.path(digests[rank_1])
    if damage == "gone":
        path.unlink()
        monkeypatch.setattr("memory.page_files.PageFiles.has", lambda self, digest: True)
    else:
        data = bytearray(path.read_bytes())
        data[90] ^= 1
        path.write_bytes(data[:-1] if damage == "cut" else data)
    with open_engine(folders, tmp_path, method, 2, max_batch_tokens=128) as engine:
        assert answer(engine, prompt) == (expected, BLOCK * rank_1)
        details = engine.stats().details
        assert (details["num_loaded_pages"], details["num_damaged_pages"]) == (rank_1, damage != "gone")


def test_a_step_without_stored_pages_tells_no_errand(folders, tmp_path):
    with open_engine(folders, tmp_path, None, 2) as engine:
        errands = []
        run_errand = engine.runner.run_errand
        engine.runner.run_errand = lambda loads=(): errands.append(loads) or run_errand(loads)
        answer(engine, make_prompt(300))
        assert not errands
        engine.keep_alive()  # what the last step filled
        engine.keep_alive()
        assert len(errands) <= 1
        answer(engine, make_prompt(300))
    with open_engine(folders, tmp_path, None, 2) as engine:
        assert answer(engine, make_prompt(300))[1] == 288


def test_a_page_that_is_free_before_it_is_saved_is_not(folders, tmp_path):
    """Something may arrive in it from another worker before the ranks are told."""
    with open_engine(folders, tmp_path, None, 2) as engine:
        pool = engine.pool
        engine.add(make_request("r", make_prompt(64), replace(GREEDY, max_tokens=1)))
        while engine.has_work:
            engine.step()
        saves = dict(pool._saves)
        assert saves and all(pool.rank_of(page) == 1 for page in saves)
        engine.cache.clear()
        assert not pool.has_saves


def test_reserved_pages_that_come_back_are_loaded_into(folders, tmp_path):
    """A decode worker whose prompt does not come: its pages have landmarks that all ranks must know, then others."""
    prompts = [make_prompt(200, seed) for seed in range(2)]
    with open_engine(folders, tmp_path, NEAR) as first:
        expected = [answer(first, prompt)[0]["r", 0] for prompt in prompts]
    with open_engine(folders, tmp_path, HOST, 2) as decode:
        decode.add(make_request("loaded", prompts[0], GREEDY))
        tokens = collect(decode.step())
        for name in ("gone", "gone too"):
            assert decode.reserve(make_request(name, make_prompt(200, 9), GREEDY)) is not None
        decode.release_reservation("gone")
        decode.add(make_request("second", prompts[1], replace(GREEDY, n=2)))
        for key, own in collect(run(decode)).items():
            tokens.setdefault(key, []).extend(own)
        assert tokens == {("loaded", 0): expected[0], ("second", 0): expected[1], ("second", 1): expected[1]}
        assert decode.stats().num_cached_tokens == 2 * 192


@pytest.mark.parametrize("method", [None, pytest.param(HOST, marks=pytest.mark.slow)], ids=["dense", "host"])
def test_random_requests_over_ranks_that_come_and_go(folders, tmp_path, method):
    """Forks, preemption and cancelling with little room, files damaged and gone meanwhile; seeded."""
    rng = random.Random(5)
    roots, num_cached, num_preemptions = [make_prompt(230, seed) for seed in range(3)], 0, 0
    with open_engine(folders, None, method, prefix_cache=False, kv_bytes="16MiB") as alone:
        for life in range(3):
            world_size = 1 + life % 3
            room, tight = str(24 // world_size * 8448), method
            if method is not None:
                room, tight = "512KiB", replace(method, blocks_bytes=room)
            with open_engine(folders, tmp_path, tight, world_size, kv_bytes=room) as engine:
                for batch in range(2):
                    requests = []
                    for index in range(3):
                        prompt = rng.choice(roots)[: rng.randrange(1, 150)] + make_prompt(rng.randrange(1, 30), index)
                        params = replace(GREEDY, n=rng.choice((1, 1, 2)), max_tokens=rng.randrange(30, 70))
                        requests.append(make_request(f"{life}.{batch}.{index}", prompt, params))
                        engine.add(requests[-1])
                    engine.add(make_request("left", rng.choice(roots), GREEDY))
                    deltas = [delta for _ in range(rng.randrange(1, 6)) for delta in engine.step()]
                    engine.cancel("left")
                    check_pages(engine)
                    deltas += run(engine)
                    num_cached += sum({delta.request_id: delta.num_cached_tokens for delta in deltas}.values())
                    for request in requests:
                        alone.add(request)
                    got = collect([delta for delta in deltas if delta.request_id != "left"])
                    assert got == collect(run(alone))
                    for path in rng.sample(sorted(tmp_path.rglob("*.kv")), 2):
                        path.unlink() if rng.random() < 0.5 else path.write_bytes(b"lctxkv02")
                num_preemptions += engine.stats().num_preemptions
    assert num_cached > 400
    assert num_preemptions > 0
