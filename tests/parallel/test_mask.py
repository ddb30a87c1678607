"""Tiles cover exactly what the mask's definition shows, over every layout, document boundary, window and prefix."""

import random

import pytest
import torch

from parallel.layout import LAYOUTS, join_layouts, make_layout
from parallel.mask import Mask, make_tiles
from parallel.shard import token_positions
from parallel.tile_attention import decompose, make_block_mask
from tests.parallel.dense_reference import visible_entries


def make_cases(num_cases: int):
    rng = random.Random(7)
    for _ in range(num_cases):
        length, world_size = rng.randrange(60), rng.randrange(1, 6)
        cu_seqlens = None
        if length and rng.random() < 0.5:
            cu_seqlens = (0, *sorted(rng.choices(range(length + 1), k=rng.randrange(5))), length)
        causal = rng.random() < 0.7
        window = rng.choice([None, 1, 3, 10]) if causal else None
        window_group = rng.choice([1, 1, 2, 5]) if window else 1
        prefix = rng.randrange(length + 1) if rng.random() < 0.4 else 0
        yield Mask(causal, window, cu_seqlens, window_group), length, prefix, world_size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_and_their_blocks_are_the_mask(layout):
    for mask, length, prefix, world_size in make_cases(150):
        bounds = mask.cu_seqlens
        q_layout = make_layout(layout, length - prefix, world_size, cu_seqlens=bounds, offset=prefix)
        before = None if bounds is None else [min(bound, prefix) for bound in bounds]
        kv_layout = join_layouts([make_layout(layout, prefix, world_size, cu_seqlens=before), q_layout])
        for q_spans in q_layout:
            for kv_spans in kv_layout:
                expected = visible_entries(mask, token_positions(q_spans), token_positions(kv_spans))
                covered = torch.zeros(expected.shape, dtype=torch.int64)
                for tile in make_tiles(mask, q_spans, kv_spans):
                    add_tile(covered, tile)
                assert torch.equal(covered, expected.long())


def add_tile(covered: torch.Tensor, tile) -> None:
    """Count each entry that the tile's blocks compute, checking the tile's own promises."""
    inside = covered[tile.q_start : tile.q_stop, tile.kv_start : tile.kv_stop]
    before = inside.sum()
    row, column = torch.arange(inside.shape[0])[:, None], torch.arange(inside.shape[1])[None]
    visible = (column >= row + tile.low) & (column <= row + tile.high)
    assert tile.stairs is None or tile.stairs.hides(inside.shape[0])
    assert visible.any(0).all()
    assert visible.any(1).all()
    assert tile.is_full == (tile.stairs is None and bool(visible.all()))
    for block in decompose(tile):
        part = inside[block.q_start : block.q_stop, block.kv_start : block.kv_stop]
        if block.low is not None:
            part += (~make_block_mask(block, part.device)).long()
        elif block.is_causal:
            assert part.shape[0] == part.shape[1]
            part += torch.ones_like(part).tril()
        else:
            part += 1
    if tile.stairs is None:
        assert inside.sum() - before == tile.area
    else:
        assert inside.sum() - before <= tile.area


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="window=0 is not allowed: a whole number of at least 1"):
        Mask(window=0)
    with pytest.raises(ValueError, match="a window looks back"):
        Mask(causal=False, window=4)
    with pytest.raises(ValueError, match="window_group=0 is not allowed"):
        Mask(window=4, window_group=0)
    with pytest.raises(ValueError, match="window_group=2 is not allowed without a window"):
        Mask(window_group=2)
    striped, contiguous = make_layout("striped", 8, 2), make_layout("contiguous", 8, 2)
    with pytest.raises(ValueError, match="same stride"):
        make_tiles(Mask(), striped[0], contiguous[0])
