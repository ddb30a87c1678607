"""An engine over several ranks says what an engine on one rank says, token for token in float32."""

import random
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from longctx.engine.build import build_engine, build_rank
from longctx.engine.config import EngineConfig
from longctx.engine.loop import EngineLoop
from longctx.messages import SamplingParams
from longctx.models.config import ModelConfig
from longctx.shards.group import ShardGroup
from longctx.shards.plans import PlanChoice
from longctx.shards.runner import follow
from parallel.carrier import ExchangeError
from parallel.gloo_group import GlooGroup, open_meeting
from tests.longctx.engines import GREEDY, generate, make_engine, make_request
from tests.longctx.sharded_engine import LOOPBACK, TIMEOUT_S, sharded_engine
from tests.parallel.gloo_ranks import run_ranks
from tests.tiny_checkpoints import make_checkpoint

PLANS = (
    "auto",
    "token_ring",
    "kv_ring",
    "kv_two_way",
    "kv_direct",
    "all_gather",
    "ulysses",
    "q_direct",
    "fewest_bytes",
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def make_prompts(lengths, *, seed=0, vocab_size=200):
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


def requests_of(prompts, params=GREEDY):
    return [make_request(f"r{index}", prompt, params) for index, prompt in enumerate(prompts)]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("attention", ["native", "torch"])
def test_tokens_are_those_of_one_rank(llama, world_size, attention):
    prompts = make_prompts([1, 5, 16, 33, 100, 257])
    options = {"attention": attention, "page_size": 16, "max_batch_tokens": 64}
    expected = generate(make_engine(llama, **options), requests_of(prompts))
    with sharded_engine(llama, world_size, **options) as engine:
        assert generate(engine, requests_of(prompts)) == expected


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_is_right(llama, plan):
    prompts = make_prompts([40, 200])
    options = {"page_size": 16, "max_batch_tokens": 64}
    expected = generate(make_engine(llama, **options), requests_of(prompts))
    with sharded_engine(llama, 3, plan=plan, **options) as engine:
        assert generate(engine, requests_of(prompts)) == expected


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3", "gemma"])
def test_every_family_is_right(tmp_path, family):
    folder = make_checkpoint(tmp_path / family, family)
    prompts = make_prompts([7, 90, 150])
    options = {"page_size": 16, "max_batch_tokens": 48}
    expected = generate(make_engine(folder, **options), requests_of(prompts))
    with sharded_engine(folder, 2, **options) as engine:
        assert generate(engine, requests_of(prompts)) == expected


def test_rotary_embeddings_that_depend_on_the_length(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = make_checkpoint(tmp_path / "m", "llama", rope_parameters=rope, max_position_embeddings=64)
    prompts = make_prompts([30, 70, 120])
    options = {"page_size": 16, "max_batch_tokens": 48, "max_context": 200}
    expected = generate(make_engine(folder, **options), requests_of(prompts))
    with sharded_engine(folder, 2, **options) as engine:
        assert generate(engine, requests_of(prompts)) == expected


def test_prefixes_are_found_where_they_lie(llama):
    (prefix,) = make_prompts([128])
    prompts = [prefix + tail for tail in make_prompts([1, 20, 33], seed=5)]
    options = {"page_size": 16, "max_batch_tokens": 64}
    expected = [generate(make_engine(llama, **options), [make_request("r", prompt)]) for prompt in prompts]
    with sharded_engine(llama, 3, **options) as engine:
        assert [generate(engine, [make_request("r", prompt)]) for prompt in prompts] == expected
        assert engine.stats().num_cached_tokens == 256


def test_several_sequences_of_one_prompt_and_preemption(llama):
    """Forked pages are copied on their rank; a pool that is too small preempts, and loses nothing."""
    params = SamplingParams(n=3, temperature=0.8, seed=11, max_tokens=40, ignore_eos=True)
    prompts = make_prompts([37, 61, 20, 45])
    options = {"page_size": 16, "max_batch_tokens": 64}
    expected = generate(make_engine(llama, **options), requests_of(prompts, params))
    layout = make_engine(llama, **options).pool.layout
    with sharded_engine(llama, 2, **options, kv_bytes=str(14 * layout.page_bytes)) as engine:
        assert engine.pool.num_pages == 28
        assert generate(engine, requests_of(prompts, params)) == expected
        assert engine.stats().num_preemptions > 0


def test_a_context_that_fits_no_single_rank(llama):
    (prompt,) = make_prompts([150])
    options = {"page_size": 16, "max_batch_tokens": 64}
    expected = generate(make_engine(llama, **options), requests_of([prompt]))
    layout = make_engine(llama, **options).pool.layout
    with sharded_engine(llama, 4, **options, kv_bytes=str(3 * layout.page_bytes)) as engine:
        assert engine.max_context == 192
        assert generate(engine, requests_of([prompt])) == expected


def test_a_lost_rank_fails_the_step_and_every_later_one(llama):
    with sharded_engine(llama, 3, page_size=16, ends_well=False) as engine:
        for request in requests_of(make_prompts([40, 50])):
            engine.add(request)
        engine.step()
        engine.lose_rank(2)
        for _ in range(2):
            with pytest.raises(ExchangeError):
                engine.step()
        deltas = engine.fail_all("a rank was lost")
        assert {delta.finish_reason for delta in deltas} == {"error"}


def test_a_failure_of_rank_0_breaks_the_engine(llama, monkeypatch):
    with sharded_engine(llama, 2, page_size=16, ends_well=False) as engine:
        engine.add(make_request("r", [1, 2, 3]))
        monkeypatch.setattr(engine.decoder, "hidden", lambda batch: 1 / 0)
        with pytest.raises(ExchangeError, match="rank 0 failed in a step: division by zero"):
            engine.step()


SILENCE_S = 4.0  # after which rank 0 counts as lost


def live_idle(rank, world_size, folder, checkpoint):
    """Rank 0 has nothing to do for longer than that, then answers; the others follow it to its end."""
    file = Path(folder) / "port"
    if rank == 0:
        place = open_meeting(LOOPBACK, timeout_s=TIMEOUT_S)
        file.with_suffix(".new").write_text(str(place.port))
        file.with_suffix(".new").rename(file)
    else:
        while not file.exists():
            time.sleep(0.01)
        place = (LOOPBACK, int(file.read_text()))
    group = GlooGroup(rank, world_size, meeting=place, address=LOOPBACK, timeout_s=TIMEOUT_S)
    shards = ShardGroup(group, "here", PlanChoice("auto"), SILENCE_S)
    model = ModelConfig(path=str(checkpoint), device="cpu")
    config = EngineConfig(num_threads=1, max_sequences=16, kv_bytes="4MiB", page_size=16)
    if rank:
        return follow(build_rank(model, config, shards), group, timeout_s=SILENCE_S)
    token_ids, ended = [], Future()

    def take(deltas):
        token_ids.extend(token_id for delta in deltas for token_id in delta.token_ids)
        if deltas[-1].finish_reason:
            ended.set_result(deltas[-1].finish_reason)

    loop = EngineLoop(build_engine(model, config, shards=shards), take)
    time.sleep(1.5 * SILENCE_S)
    loop.call(loop.engine.add, make_request("r", list(range(1, 60))))
    assert ended.result(TIMEOUT_S) == "length"
    loop.close()
    return token_ids


@pytest.mark.slow
def test_idle_ranks_hear_that_rank_0_lives(llama):
    told, _ = run_ranks(live_idle, 2, llama)
    assert told == generate(make_engine(llama, page_size=16), [make_request("r", list(range(1, 60)))])["r", 0]
