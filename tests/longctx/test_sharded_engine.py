"""An engine over several ranks says what an engine on one rank says, token for token in float32."""

import random

import pytest

from tests.longctx.engines import GREEDY, generate, make_engine, make_request
from tests.longctx.sharded_engine import sharded_engine
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
