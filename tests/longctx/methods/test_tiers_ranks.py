"""Ranks whose blocks lie below say what one rank with near blocks says."""

from dataclasses import replace

import psutil
import pytest
import torch

from longctx.attention.config import AttentionConfig
from longctx.errors import ConfigError
from longctx.messages import SamplingParams
from memory.layout import MIN_CACHE
from memory.rank_tiers import RankTiers
from tests.longctx.engines import GREEDY, collect, generate, make_engine, make_request, run
from tests.longctx.methods.test_landmark_inference import BLOCK, METHOD, TOP_K, make_prompt, record_logits
from tests.longctx.sharded_engine import sharded_engine
from tests.tiny_checkpoints import make_checkpoint

NEAR = AttentionConfig(top_k=TOP_K)
PAGE_BYTES = 8448
BATCH = 64  # tokens of a step on each rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("landmark"), "llama", longctx_attention=METHOD)


def tiered_engine(folder, world_size, *, blocks="host", num_below=200, num_missing=0, max_sequences=4, **options):
    """As little near as a rank takes; ``num_below`` pages on each."""
    num_near = world_size * BATCH // BLOCK + 2 * max_sequences + MIN_CACHE - num_missing
    method = replace(NEAR, blocks=blocks, blocks_bytes=str(num_below * PAGE_BYTES))
    options |= {"max_batch_tokens": BATCH, "max_sequences": max_sequences, "kv_bytes": str(num_near * PAGE_BYTES)}
    return sharded_engine(folder, world_size, method=method, **options)


def near_engine(folder, world_size, **options):
    """One rank, whose steps are as long; all blocks are near."""
    return make_engine(folder, method=NEAR, max_batch_tokens=BATCH * world_size, kv_bytes="16MiB", **options)


def tiers_of(engine):
    return [part._tiers for part in engine.parts]


def check_frames(tiers):
    """After a step: only pages that are not full have frames."""
    assert isinstance(tiers, RankTiers)
    assert not tiers._filled
    assert not tiers._final
    staged = (tiers._staged_P >= 0).nonzero()[:, 0].tolist()
    assert len(tiers._free_frames) + len(staged) == tiers._num_staging
    assert len({*tiers._free_frames, *tiers._staged_P[staged].tolist()}) == tiers._num_staging
    return len(staged)


@pytest.mark.parametrize(("world_size", "blocks"), [(2, "host"), (2, "file"), (3, "host")])
def test_tokens_are_those_of_one_rank(folder, world_size, blocks):
    """Prompts in chunks beside sequences that decode, of one token to more blocks than fit near."""
    requests = [make_request(f"r{n}", make_prompt(n, n)) for n in (1, 5, BLOCK, 2 * BLOCK + 1, 900, 257)]
    expected = generate(near_engine(folder, world_size), requests)
    with tiered_engine(folder, world_size, blocks=blocks) as engine:
        assert generate(engine, requests) == expected
        for tiers in tiers_of(engine):
            assert check_frames(tiers) <= 1
            assert tiers.num_fetched > 0
            assert tiers.num_hits > 0


@pytest.mark.parametrize("blocks", ["host", pytest.param("file", marks=pytest.mark.slow)])
def test_logits_are_bit_for_bit_those_of_near_blocks(folder, blocks):
    """Of as many ranks. One sequence: a rank without a token in a step is asked for blocks."""
    prompts, logits = [make_prompt(n, n) for n in (20, 131, 900)], []
    near = sharded_engine(folder, 2, method=NEAR, max_batch_tokens=BATCH)
    for made in (near, tiered_engine(folder, 2, blocks=blocks)):
        with made as engine:
            steps = record_logits(engine)
            for prompt in prompts:
                engine.add(make_request("r", prompt, replace(GREEDY, max_tokens=2 * BLOCK + 3)))
                collect(run(engine))
            logits.append([step for step in steps if len(step)])
    assert len(logits[0]) == len(logits[1]) == 3 * (2 * BLOCK + 3)
    assert all(map(torch.equal, *logits))


def test_forks_preemption_and_prefixes(folder):
    """Ten sequences that do not fit below together; pages are used again at once, others found by their content."""
    params = SamplingParams(n=3, temperature=0.8, seed=11, max_tokens=40, ignore_eos=True)
    requests = [make_request(f"f{n}", make_prompt(n, 50 + 61 * n), params) for n in range(3)]
    requests.append(make_request("one", make_prompt(7, 200), replace(GREEDY, max_tokens=70)))
    prefix = make_prompt(9, 9 * BLOCK)
    later = [make_request(f"p{n}", prefix + make_prompt(n, 10 * n)) for n in (1, 2)]
    one = near_engine(folder, 2, prefix_cache=False)
    expected = [generate(one, requests), *(generate(one, [request]) for request in later)]
    with tiered_engine(folder, 2, num_below=18, max_sequences=16) as engine:
        got = [generate(engine, requests), *(generate(engine, [request]) for request in later)]
        assert engine.stats().num_preemptions > 0
        assert engine.stats().num_cached_tokens >= len(prefix)
        assert sum(map(check_frames, tiers_of(engine))) <= 1
    assert got == expected


def test_cancelled_sequences_leave_nothing(folder):
    """Their pages are another's in the next step, in whatever state they were, fetched ahead or not."""
    expected = generate(near_engine(folder, 2, prefix_cache=False), [make_request("x", make_prompt(50, 333))])
    with tiered_engine(folder, 2, num_below=36, prefix_cache=False) as engine:
        for steps in (1, 2, 3, 5, 8, 13):
            for name in "abc":
                engine.add(make_request(name, make_prompt(steps, 90 + 37 * (ord(name) - 96))))
            for _ in range(steps):
                engine.step()
            for name in "abc":
                engine.cancel(name)
            assert engine.stats().num_pages_used == 0
            assert generate(engine, [make_request("x", make_prompt(50, 333))]) == expected
            assert sum(map(check_frames, tiers_of(engine))) <= 1


def test_many_short_sequences_fit_their_frames(folder):
    """As many as may run, each with a page that is not full, and all of them on whatever rank has room."""
    requests = [make_request(f"r{n}", make_prompt(n, 3 + n % 29), replace(GREEDY, max_tokens=20)) for n in range(60)]
    expected = generate(near_engine(folder, 2), requests)
    with tiered_engine(folder, 2, max_sequences=16) as engine:
        assert generate(engine, requests) == expected


@pytest.mark.parametrize(
    ("room", "told"),
    [
        ({"num_missing": 1}, r"32 pages of 8448 bytes have to be near \(2 engine.max_batch_tokens / page"),
        ({"num_below": psutil.virtual_memory().available // PAGE_BYTES * 3 // 4}, "GiB are free for each of 2 ranks"),
    ],
)
def test_what_does_not_fit_is_refused(folder, room, told):
    with pytest.raises(ConfigError, match=told), tiered_engine(folder, 2, **room):
        pass
