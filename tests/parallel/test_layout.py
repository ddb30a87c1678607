"""Layouts are permutations of the sequence, whatever its length; balanced ones share the area."""

import random
from itertools import accumulate

import pytest
import torch

from parallel.layout import LAYOUTS, count_tokens, make_layout
from parallel.mask import Mask, make_tiles
from parallel.shard import shard_sequence, token_positions, unshard_sequence


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [0, 1, 3, 17, 64, 101])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shards_are_put_together_again(layout, length, world_size):
    x = torch.randn(2, length, 3)
    cu_seqlens = sorted({0, length // 5, length // 2, length}) if length > 1 else [0, length]
    parts = [
        shard_sequence(x, 1, rank=rank, world_size=world_size, layout=layout, cu_seqlens=cu_seqlens)
        for rank in range(world_size)
    ]
    for part, positions in parts:
        assert torch.equal(part, x[:, positions])
    assert sorted(torch.cat([positions for _, positions in parts]).tolist()) == list(range(length))
    assert torch.equal(unshard_sequence([part for part, _ in parts], -2, layout=layout, cu_seqlens=cu_seqlens), x)


def test_zigzag_gives_rank_r_chunks_r_and_2w_minus_1_minus_r():
    layout = make_layout("zigzag", 80, 4)
    assert [token_positions(spans)[::10].tolist() for spans in layout] == [[0, 70], [10, 60], [20, 50], [30, 40]]


def test_striped_deals_tokens_round():
    assert token_positions(make_layout("striped", 10, 3)[1]).tolist() == [1, 4, 7]


@pytest.mark.parametrize("world_size", [2, 4, 8, 64])
@pytest.mark.parametrize(
    "lengths",
    [[100] * 400, [8192, 100, 100, 3000, 17], [5000, 5000, 5000], [16384], [1] * 5000, "random"],
    ids=["equal", "mixed", "three", "one", "tiny", "random"],
)
def test_balanced_shares_the_area_within_3_percent(world_size, lengths):
    rng = random.Random(world_size)
    lengths = [rng.randrange(1, 4000) for _ in range(60)] if lengths == "random" else lengths
    cu_seqlens = (0, *accumulate(lengths))
    layout = make_layout("balanced", cu_seqlens[-1], world_size, cu_seqlens=cu_seqlens)
    mask = Mask(cu_seqlens=cu_seqlens)
    areas = [sum(tile.area for kv in layout for tile in make_tiles(mask, q, kv)) for q in layout]
    mean = sum(areas) / world_size
    assert all(abs(area - mean) <= 0.03 * mean for area in areas)


def test_balanced_keeps_short_documents_whole():
    cu_seqlens = tuple(range(0, 4001, 100))
    layout = make_layout("balanced", 4000, 4, cu_seqlens=cu_seqlens)
    assert [[(span.start, span.stop) for span in spans] for spans in layout] == [
        [(0, 1000)],
        [(1000, 2000)],
        [(2000, 3000)],
        [(3000, 4000)],
    ]


@pytest.mark.parametrize("world_size", [1, 2, 5, 64])
def test_balanced_holds_every_token_once_whatever_the_documents(world_size):
    """Empty ones, of one token, fewer tokens than ranks, and cut where a cached prefix ends."""
    rng = random.Random(world_size)
    for _ in range(200):
        lengths = [rng.choice([0, 1, rng.randrange(60)]) for _ in range(rng.randrange(1, 12))]
        cu_seqlens = (0, *accumulate(lengths))
        offset = rng.choice([0, cu_seqlens[-1] // 3])
        layout = make_layout("balanced", cu_seqlens[-1] - offset, world_size, cu_seqlens=cu_seqlens, offset=offset)
        held = [token_idx for spans in layout for token_idx in token_positions(spans).tolist()]
        assert sorted(held) == list(range(offset, cu_seqlens[-1]))


def test_mistakes_are_named():
    x = torch.zeros(1, 10)
    with pytest.raises(ValueError, match="allowed: contiguous, zigzag, striped, balanced"):
        shard_sequence(x, 1, rank=0, world_size=2, layout="zig")
    with pytest.raises(ValueError, match="rank=2 is not allowed: 0 to world_size - 1 = 1"):
        shard_sequence(x, 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="it rises from 0 to the sequence's length, 10"):
        shard_sequence(x, 1, rank=0, world_size=2, cu_seqlens=[0, 4, 9])
    with pytest.raises(ValueError, match="rank 0's part has 4 tokens; zigzag over 10 tokens and 2 ranks gives it 5"):
        unshard_sequence([x[:, :4], x[:, 4:]], 1)


def test_counts_without_positions():
    assert [count_tokens(spans) for spans in make_layout("striped", 10, 4)] == [3, 3, 2, 2]
