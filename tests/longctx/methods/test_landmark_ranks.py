"""Ranks that share a landmark model's sequences say what one rank says, and what the formulas say."""

from dataclasses import replace

import pytest
import torch

from cluster.config import ClusterConfig, DecodeConfig, PrefillConfig, ServeConfig
from cluster.preflight import check
from longctx.attention.config import AttentionConfig
from longctx.errors import ConfigError
from longctx.messages import SamplingParams
from longctx.models.config import ModelConfig
from longctx.shards.block_exchange import BlockExchange, BlockRows
from parallel.carrier import ExchangeError, VirtualNetwork, drive_together
from tests.longctx.engines import GREEDY, collect, generate, make_engine, make_request, run
from tests.longctx.methods.test_landmark_inference import (
    BLOCK,
    METHOD,
    TOP_K,
    error,
    make_prompt,
    record_logits,
    reference_logits,
)
from tests.longctx.sharded_engine import sharded_engine
from tests.tiny_checkpoints import make_checkpoint

LANDMARKS = AttentionConfig(top_k=TOP_K)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("landmark")
    return {family: make_checkpoint(root / family, family, longctx_attention=METHOD) for family in ("llama", "qwen3")}


def requests_of(lengths, params=GREEDY):
    return [make_request(f"r{seed}", make_prompt(seed, length), params) for seed, length in enumerate(lengths)]


@pytest.mark.parametrize(
    ("world_size", "family", "implementation", "retrieval"),
    [
        (2, "llama", "native", "head_token"),
        (2, "qwen3", "native", "head"),
        (3, "llama", "torch", "token"),
        pytest.param(4, "llama", "native", "head", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_one_rank(folders, world_size, family, implementation, retrieval):
    """Grouped heads; prompts in chunks, together with sequences that decode. A chunk is as long on one rank."""
    requests = requests_of((1, 5, BLOCK, 2 * BLOCK + 1, 100, 257))
    method = replace(LANDMARKS, retrieval=retrieval)
    options = {"method": method, "attention": implementation}
    expected = generate(make_engine(folders[family], max_batch_tokens=32 * world_size, **options), requests)
    with sharded_engine(folders[family], world_size, max_batch_tokens=32, **options) as engine:
        assert generate(engine, requests) == expected


def test_decoding_equals_the_formulas_at_every_length(folders):
    """One sequence: in every step that decodes, two of three ranks have no token, and serve the third."""
    prompt = make_prompt(0, 4 * BLOCK + 3)
    with sharded_engine(folders["llama"], 3, method=LANDMARKS, max_batch_tokens=16) as engine:
        steps = record_logits(engine)
        engine.add(make_request("r", prompt, replace(GREEDY, max_tokens=2 * BLOCK + 5)))
        token_ids = prompt + collect(run(engine))["r", 0]
    expected = reference_logits(folders["llama"], token_ids)[len(prompt) - 1 : -1]
    actual = torch.cat([logits for logits in steps if len(logits)]).double()
    assert actual.shape == expected.shape
    assert error(actual, expected) < 1e-4


def test_forks_prefixes_and_preemption(folders):
    """Forked pages are copied where they lie; what is found in the cache is found through its landmarks."""
    params = SamplingParams(n=3, temperature=0.8, seed=11, max_tokens=20, ignore_eos=True)
    requests = requests_of((37, 61, 20), params)
    prefix = make_prompt(9, 9 * BLOCK)
    later = [make_request(f"p{seed}", prefix + make_prompt(seed, 10 * seed)) for seed in (1, 2)]
    one = make_engine(folders["llama"], method=LANDMARKS, prefix_cache=False)
    expected = [generate(one, requests), *(generate(one, [request]) for request in later)]
    layout = one.pool.layout
    page_bytes = layout.page_bytes + 2 * layout.num_layers * layout.landmark_bytes
    options = {"method": LANDMARKS, "max_batch_tokens": 32, "kv_bytes": str(8 * page_bytes + page_bytes // 2)}
    with sharded_engine(folders["llama"], 2, **options) as engine:
        assert engine.pool.num_pages == 16
        got = [generate(engine, requests), *(generate(engine, [request]) for request in later)]
        assert engine.stats().num_preemptions > 0
        assert engine.stats().num_cached_tokens >= len(prefix)
    assert got == expected


def test_blocks_are_skipped_where_landmarks_get_little(folders):
    requests, answers = requests_of((60, 100)), {}
    for skip_below in (0.0, 0.6):
        method = replace(LANDMARKS, skip_below=skip_below)
        answers[skip_below] = generate(make_engine(folders["llama"], method=method), requests)
    assert answers[0.0] != answers[0.6]
    with sharded_engine(folders["llama"], 2, method=method) as engine:
        assert generate(engine, requests) == answers[0.6]


def test_a_lost_rank_fails_the_step(folders):
    with sharded_engine(folders["llama"], 3, method=LANDMARKS, ends_well=False) as engine:
        for request in requests_of((40, 50)):
            engine.add(request)
        engine.step()
        engine.lose_rank(2)
        for _ in range(2):
            with pytest.raises(ExchangeError):
                engine.step()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_row_sees_the_block_it_asks_for(world_size):
    """Rank r asks rank (r + i) % W for as many rows as ``i`` says; the last rank has no tokens, the first no blocks."""
    has_tokens = [world_size == 1 or rank < world_size - 1 for rank in range(world_size)]
    has_blocks = [world_size == 1 or rank > 0 for rank in range(world_size)]
    network, exchanges, expected = VirtualNetwork(world_size), [], []

    def meets(asker, holder):
        return asker != holder and has_tokens[asker] and has_blocks[holder]

    def see(rank, rows):
        pages, kv_heads, counts = rows.blocks_3B
        assert (pages // 100 == rank).all()
        return (rows.q_SD * (pages * 10 + kv_heads).repeat_interleave(counts)[:, None]).float()

    for rank in range(world_size):
        asked = []
        for holder in range(world_size):
            num_blocks = (holder - rank) % world_size if has_tokens[rank] and has_blocks[holder] else 0
            num_blocks += world_size == 1
            counts = torch.arange(1, num_blocks + 1)
            blocks = torch.stack((100 * holder + torch.arange(num_blocks), torch.arange(num_blocks) % 3, counts))
            q_SD = torch.randn(int(counts.sum()), 8, generator=torch.Generator().manual_seed(rank))
            asked.append(BlockRows(blocks, q_SD))
        expected.append([see(holder, rows) for holder, rows in enumerate(asked)])
        exchange = BlockExchange(
            network.carrier(rank),
            asked,
            holders=[other for other in range(world_size) if meets(rank, other)],
            askers=[other for other in range(world_size) if meets(other, rank)],
            see=lambda rows, rank=rank: see(rank, rows),
        )
        exchanges.append(exchange)
    drive_together([exchange.run() for exchange in exchanges])
    for exchange, wanted in zip(exchanges, expected, strict=True):
        assert all(map(torch.equal, exchange.seen, wanted))
    assert not any(network.mail.values())


def test_refusals(folders):
    """None that is the ranks' own: wherever blocks are."""
    cluster = ClusterConfig(num_prefill_workers=0, decode=DecodeConfig(sp_degree=2))
    with pytest.raises(ConfigError, match=r"cluster.prefill.sp_degree=2 is not allowed with cluster.num_prefill_wor"):
        check_served(folders["llama"], replace(cluster, prefill=PrefillConfig(sp_degree=2)))
    check_served(folders["llama"], cluster, blocks="file")
    check_served(folders["llama"], cluster)
    check_served(folders["llama"], ClusterConfig(prefill=PrefillConfig(sp_degree=3), decode=DecodeConfig(sp_degree=2)))


def check_served(folder, cluster, **options):
    check(ServeConfig(ModelConfig(path=str(folder)), cluster=cluster, attention=replace(LANDMARKS, **options)))
