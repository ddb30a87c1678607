"""Landmark and CCA attention over sequences that ranks share: output and gradients are those of the formulas."""

from functools import cache
from itertools import pairwise

import pytest
import torch

from longctx.training.cca_attention import CCAAttention
from longctx.training.config import TrainAttentionConfig
from longctx.training.landmark_attention import LandmarkAttention
from parallel.layout import LAYOUTS
from parallel.shard import shard_sequence
from tests.longctx.methods.cca_reference import cca_reference
from tests.longctx.methods.landmark_reference import landmark_reference
from tests.parallel.cells import relative_error
from tests.parallel.gloo_ranks import run_ranks

HEAD_DIM, SCALE = 8, 0.4
HEADS = {"gqa": (4, 2), "mqa": (3, 1)}
DOCUMENTS = {"one": (0, 41), "packed": (0, 3, 3, 25, 29, 52), "short": (0, 2)}
CCA = (
    TrainAttentionConfig(name="cca", group_size=4, window=6, core_position="last", head_pooling="weights"),
    TrainAttentionConfig(name="cca", group_size=3, window=3, core_position="mean", head_pooling="query"),
    TrainAttentionConfig(name="cca", group_size=5, window=12, core_position="middle", head_pooling="weights"),
)
BLOCK_SIZES = (3, 7)


def make_inputs(heads: str, documents: str) -> list[torch.Tensor]:
    """q, k, v and dout of the whole sequence."""
    num_heads, num_kv_heads = HEADS[heads]
    generator = torch.Generator().manual_seed(7)
    shapes = [(DOCUMENTS[documents][-1], each, HEAD_DIM) for each in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    return [torch.randn(1, *shape, generator=generator) for shape in shapes]


def rotate_one(x, position):
    """RoPE of one vector ``[D]``, or of rows ``[n, heads, D]`` at ``[n, 1, 1]`` or ``[n, heads, 1]``."""
    half = x.shape[-1] // 2
    angles = position * 100.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def rotate(x, positions, lengths):
    """With the length in it, so that a wrong one is noticed."""
    turned = positions.to(x.dtype)[(..., None, None) if positions.ndim == 1 else (..., None)]
    return rotate_one(x, turned) * (1 + lengths.to(x.dtype)[:, None, None] / 100)


def mark_landmarks(bounds, block_size) -> torch.Tensor:
    marks = torch.zeros(bounds[-1], dtype=torch.bool)
    for start, stop in pairwise(bounds):
        marks[start + block_size : stop : block_size + 1] = True
    return marks


@cache
def reference(case, heads, documents):
    """Output, dq, dk and dv in float64, as arrays: they travel to ranks."""
    bounds = DOCUMENTS[documents]
    q, k, v, dout = (x.double() for x in make_inputs(heads, documents))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    if isinstance(case, int):
        out = landmark_reference(*inputs, mark_landmarks(bounds, case)[None], SCALE, bounds)
    else:
        parts = []
        for start, stop in pairwise(bounds):
            factor = 1 + (stop - start) / 100
            own = [x[:, start:stop] for x in inputs]
            sizes = {"group_size": case.group_size, "window": case.window, "scale": SCALE, "bounds": (0, stop - start)}
            choices = {"core_position": case.core_position, "head_pooling": case.head_pooling}
            rope = lambda x, position, factor=factor: rotate_one(x, position) * factor  # noqa: E731
            if stop > start:
                parts.append(cca_reference(*own, rope=rope, **sizes, **choices))
        out = torch.cat(parts, 1)
    out.backward(dout)
    return [x.numpy() for x in (out.detach(), *(x.grad for x in inputs))]


def compare(rank, world_size, _folder, cases):
    for (case, heads, documents, layout), wanted in cases:
        bounds = DOCUMENTS[documents]

        def cut(x, layout=layout, bounds=bounds):
            return shard_sequence(x, 1, rank=rank, world_size=world_size, layout=layout, cu_seqlens=bounds)[0]

        *inputs, dout = map(cut, make_inputs(heads, documents))
        inputs = [x.requires_grad_() for x in inputs]
        arguments = {"group": None, "cu_seqlens": bounds, "layout": layout, "scale": SCALE}
        if isinstance(case, int):
            out = LandmarkAttention().attend(*inputs, is_landmark=mark_landmarks(bounds, case), **arguments)
        else:
            out = CCAAttention(case).attend(*inputs, rotate=rotate, **arguments)
        out.backward(dout)
        found = [out.detach(), *(x.grad for x in inputs)]
        for name, own, whole in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
            error = relative_error(own, cut(torch.from_numpy(whole)), least=1.0)
            assert error <= 2e-6, (case, heads, documents, layout, name, error)
    return len(cases)


def test_mistakes_are_named():
    q, k, v, _ = make_inputs("gqa", "one")
    attends = LandmarkAttention().attend, CCAAttention(CCA[0]).attend
    arguments = {"group": None, "cu_seqlens": (0, 41), "is_landmark": torch.zeros(41).bool(), "rotate": rotate}
    for attend in attends:
        with pytest.raises(ValueError, match="window=4 are not allowed"):
            attend(q, k, v, window=4, **arguments)
        with pytest.raises(ValueError, match="a batch of 2 is not allowed"):
            attend(*(x.repeat(2, 1, 1, 1) for x in (q, k, v)), **arguments)


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_are_exact_in_every_layout(world_size):
    cases = [
        (case, list(HEADS)[(index + place) % 2], documents, LAYOUTS[(index + place) % 4])
        for index, case in enumerate((*CCA, *BLOCK_SIZES))
        for place, documents in enumerate(DOCUMENTS)
    ]
    cases += [(case, "mqa", "packed", layout) for case in (CCA[1], 3) for layout in LAYOUTS if world_size == 3]
    cases = [(each, reference(*each[:3])) for each in cases]
    assert run_ranks(compare, world_size, cases) == [len(cases)] * world_size
