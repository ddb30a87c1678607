"""engine.prefix_folder: an engine finds the prefixes of one that ended, or of its neighbour, and says the same."""

from dataclasses import replace

import numpy as np
import pytest

from longctx.attention.config import AttentionConfig
from longctx.engine.build import build_engine
from longctx.engine.config import EngineConfig
from longctx.errors import ConfigError
from longctx.models.config import ModelConfig
from memory.prefix_cache import DigestChain
from tests.cluster.small_cluster import make_prompt
from tests.longctx.engines import hand_over, make_request, run
from tests.tiny_checkpoints import make_checkpoint

CONFIG = EngineConfig(kv_bytes="2MiB", page_size=16, num_threads=1, max_sequences=8, max_batch_tokens=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama", max_position_embeddings=8192)


def make_engine(folder, store, config=CONFIG, attention=None, **model):
    config = replace(config, prefix_folder=None if store is None else str(store))
    options = {"path": str(folder), "device": "cpu", "attention": "torch"} | model
    return build_engine(ModelConfig(**options), config, attention=attention)


def answer(engine, prompt, **options):
    engine.add(make_request("r", prompt, **options))
    deltas = run(engine)
    tokens = tuple(token for delta in deltas for token in delta.token_ids)
    return tokens, max(delta.num_cached_tokens for delta in deltas)


def test_a_prefix_outlives_its_engine(folder, tmp_path):
    prompt = make_prompt(0, 500)
    first = make_engine(folder, tmp_path)
    expected = answer(first, prompt)
    assert expected[1] == 0
    first.close()
    second = make_engine(folder, tmp_path)
    assert answer(second, prompt) == (expected[0], 496)
    assert second.stats().details["num_loaded_pages"] == 31
    longer = prompt + make_prompt(1, 100)
    tokens, num_cached = answer(second, longer)
    assert num_cached == 496
    assert tokens == answer(make_engine(folder, None), longer)[0]
    second.close()


def test_neighbours_share_and_small_steps_load_little_at_a_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("longctx.engine.scheduler.LOADED_BYTES", 3 * 8192)
    prompt = make_prompt(2, 400)
    first, second = (make_engine(folder, tmp_path) for _ in range(2))
    expected, _ = answer(first, prompt)
    first.close()
    second.add(make_request("r", prompt))
    deltas, num_steps = [], 0
    while not deltas:
        deltas, num_steps = second.step(), num_steps + 1
    assert num_steps == 8  # loads of three pages, the last one with the last tokens
    assert max(delta.num_cached_tokens for delta in deltas) == 384
    tokens = [token for delta in [*deltas, *run(second)] for token in delta.token_ids]
    assert tuple(tokens) == expected
    second.close()


def test_pages_that_the_pool_has_lost_come_back(folder, tmp_path):
    small = replace(CONFIG, kv_bytes=str(40 * 8192))
    engine = make_engine(folder, tmp_path, small)
    prompts = [make_prompt(seed, 480) for seed in range(3)]
    expected = [answer(engine, prompt)[0] for prompt in prompts]
    while engine.cache.store._waiting_bytes:
        pass
    again = [answer(engine, prompt) for prompt in prompts]
    assert [tokens for tokens, _ in again] == expected
    assert all(num_cached == 464 for _, num_cached in again)
    assert engine.cache.num_used == 0
    engine.close()


def test_salts_and_models_share_nothing(folder, tmp_path):
    prompt = make_prompt(3, 200)
    other = make_checkpoint(tmp_path / "other", "llama", max_position_embeddings=8192, rms_norm_eps=1e-3)
    first = make_engine(folder, tmp_path / "store")
    answer(first, prompt, cache_salt="a")
    first.close()
    second = make_engine(folder, tmp_path / "store")
    assert answer(second, prompt)[1] == 0
    second.close()
    third = make_engine(other, tmp_path / "store")
    assert answer(third, prompt, cache_salt="a")[1] == 0
    third.close()
    fourth = make_engine(folder, tmp_path / "store")
    assert answer(fourth, prompt, cache_salt="a")[1] == 192
    fourth.close()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"prefix_cache": False}, "prefix_cache"),
        ({"prefix_bytes": "1KiB"}, "at least two pages"),
    ],
)
def test_what_cannot_be_is_refused(folder, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        make_engine(folder, tmp_path, replace(CONFIG, **options))


def test_a_folder_that_cannot_be_used(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        make_engine(folder, tmp_path / "file")


def test_a_prefill_worker_loads_and_ships(folder, tmp_path):
    """A prompt that another one computed: the decode worker hears how much of it was cached, and says the same."""
    prompt = make_prompt(8, 300)
    first = make_engine(folder, tmp_path)
    expected = answer(first, prompt)[0]
    first.close()
    prefill, decode = make_engine(folder, tmp_path), make_engine(folder, None)
    export = hand_over(prefill, decode, make_request("r", prompt))
    assert not run(prefill)
    prefill.export_done("r")
    deltas = decode.attach("r", export.first) + run(decode)
    assert tuple(token for delta in deltas for token in delta.token_ids) == expected
    assert {delta.num_cached_tokens for delta in deltas} == {288}
    prefill.close()


def test_tokens_that_were_computed_are_not_cached_ones(folder, tmp_path):
    """Two alike beside each other: the second one takes over what the first completes, but not what it computed."""
    prompt = make_prompt(9, 400)
    engine = make_engine(folder, None, replace(CONFIG, max_batch_tokens=128))
    engine.add(make_request("a", prompt))
    engine.add(make_request("b", prompt[:200] + make_prompt(10, 30)))
    cached = {delta.request_id: delta.num_cached_tokens for delta in run(engine)}
    computed = engine.stats().num_prompt_tokens - engine.stats().num_cached_tokens
    assert cached["a"] + cached["b"] == 630 - computed
    assert 0 < cached["b"] <= 192


# Landmark attention, whose blocks lie near or below

LANDMARK = {"name": "landmark", "block_size": 16, "landmark_token_id": 255}
NEAR = AttentionConfig(top_k=2)
BELOW = [replace(NEAR, blocks=blocks, blocks_bytes="4MiB") for blocks in ("host", "file")]


@pytest.fixture(scope="module")
def landmark_folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "landmark", "llama", longctx_attention=LANDMARK)


def make_landmark_prompt(seed, length):
    return [token for token in make_prompt(seed, 2 * length) if token != 255][:length]


@pytest.mark.parametrize("first, second", [(BELOW[0], BELOW[1]), (NEAR, BELOW[0]), (BELOW[1], NEAR)])
def test_blocks_are_found_wherever_they_lie(landmark_folder, tmp_path, first, second):
    """Also the last of a prompt, which has a frame until the next step, and those that a decoding sequence filled."""
    prompt = make_landmark_prompt(4, 400)
    expected = answer(make_engine(landmark_folder, None, attention=NEAR), prompt)
    engine = make_engine(landmark_folder, tmp_path, attention=first)
    assert answer(engine, prompt) == expected
    engine.close()
    engine = make_engine(landmark_folder, tmp_path, attention=second)
    assert answer(engine, prompt) == (expected[0], 384)
    longer = prompt + list(expected[0])
    tokens, num_cached = answer(engine, longer + [1, 2])
    assert num_cached == 416
    assert tokens == answer(make_engine(landmark_folder, None, attention=NEAR), longer + [1, 2])[0]
    assert engine.cache.num_used == 0
    engine.close()


def test_what_tokens_saw_is_part_of_a_prefix(landmark_folder, tmp_path):
    prompt = make_landmark_prompt(5, 200)
    engine = make_engine(landmark_folder, tmp_path, attention=NEAR)
    answer(engine, prompt)
    engine.close()
    for other in (replace(NEAR, top_k=1), replace(NEAR, retrieval="token"), replace(NEAR, skip_below=0.5)):
        engine = make_engine(landmark_folder, tmp_path, attention=other)
        assert answer(engine, prompt)[1] == 0
        engine.close()


def test_damage_under_tiers_costs_a_step(landmark_folder, tmp_path):
    prompt = make_landmark_prompt(6, 400)
    engine = make_engine(landmark_folder, tmp_path, attention=BELOW[0])
    expected = answer(engine, prompt)[0]
    engine.close()
    path = engine.cache.store._files.path(digests_of(prompt)[10])
    path.write_bytes(path.read_bytes()[:-1])
    engine = make_engine(landmark_folder, tmp_path, attention=BELOW[0])
    assert answer(engine, prompt) == (expected, 384 - CONFIG.max_batch_tokens)  # computed, and then the rest is found
    assert engine.stats().details["num_damaged_pages"] == 1
    engine.close()


def digests_of(prompt, salt="\0"):
    chain = DigestChain(16, salt)
    chain.extend(np.array(prompt))
    return chain.digests
