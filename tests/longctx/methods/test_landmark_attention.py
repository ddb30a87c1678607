"""Landmark attention against its formulas in float64: any block lengths, packed documents, gradients."""

import pytest
import torch

import longctx
from longctx.attention import landmark_products
from tests.longctx.methods.landmark_reference import landmark_reference

CASES = {
    "blocks of 4": (21, [4, 9, 14, 19], None),
    "block borders": (20, [4, 9, 14, 19], None),
    "ragged": (23, [1, 3, 9, 20], None),
    "no landmark": (7, [], None),
    "one token": (1, [], None),
    "one token and its landmark": (2, [1], None),
    "packed": (30, [4, 9, 14, 20, 24, 27], (0, 11, 12, 30)),
    "packed at borders": (30, [4, 9, 14, 20, 29], (0, 10, 10, 15, 30)),
}


def make_inputs(name, heads, head_dim, dtype, batch=1):
    length, marks, bounds = CASES[name]
    torch.manual_seed(0)
    q, k, v, dout = (
        torch.randn(batch, length, h, head_dim, dtype=torch.float64) for h in (heads[0], heads[1], heads[1], heads[0])
    )
    is_landmark = torch.zeros(batch, length, dtype=torch.bool)
    is_landmark[:, marks] = True
    return [x.to(dtype) for x in (q * 2, k, v, dout)], is_landmark, bounds


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("tile", [1 << 24, 100], ids=["one tile", "tiles"])
def test_outputs_and_gradients_are_the_formulas(name, heads, dtype, most, tile, monkeypatch):
    monkeypatch.setattr(landmark_products, "TILE_SCORES", tile)
    batch = 1 if CASES[name][2] else 2
    (q, k, v, dout), is_landmark, bounds = make_inputs(name, heads, 8, dtype, batch)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected = landmark_reference(*exact, is_landmark, 0.3, bounds or (0, q.shape[1]))
    expected.backward(dout.double())
    out = longctx.landmark_attention(*inputs, is_landmark=is_landmark, scale=0.3, cu_seqlens=bounds)
    out.backward(dout)
    for value, reference in zip((out, *(x.grad for x in inputs)), (expected, *(x.grad for x in exact)), strict=True):
        assert value.dtype == dtype
        assert (value.double() - reference).abs().max() <= most * max(1.0, reference.abs().max())


def test_gradcheck():
    (q, k, v, _), is_landmark, bounds = make_inputs("packed", (2, 1), 2, torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *x: longctx.landmark_attention(*x, is_landmark=is_landmark, cu_seqlens=bounds), inputs
    )


def test_rows_of_a_batch_have_blocks_of_their_own():
    (q, k, v, _), is_landmark, _ = make_inputs("ragged", (4, 2), 8, torch.float64, batch=2)
    is_landmark[1] = False
    is_landmark[1, 7] = True
    out = longctx.landmark_attention(q, k, v, is_landmark=is_landmark)
    for row in range(2):
        alone = (x[row : row + 1] for x in (q, k, v))
        torch.testing.assert_close(
            out[row : row + 1], longctx.landmark_attention(*alone, is_landmark=is_landmark[row : row + 1])
        )


def test_what_a_landmark_holds_as_a_value_is_never_seen():
    (q, k, v, _), is_landmark, bounds = make_inputs("packed", (4, 2), 8, torch.float64)
    out = longctx.landmark_attention(q, k, v, is_landmark=is_landmark, cu_seqlens=bounds)
    v[is_landmark] = 1e6
    assert torch.equal(out, longctx.landmark_attention(q, k, v, is_landmark=is_landmark, cu_seqlens=bounds))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"is_landmark": torch.zeros(1, 20, dtype=torch.bool)}, r"is_landmark of shape \(1, 20\)"),
        ({"is_landmark": torch.zeros(1, 21)}, "dtype torch.float32 is not allowed: bool"),
        ({"is_landmark": torch.ones(1, 21, dtype=torch.bool)}, "the block at token 0 has no token but its landmark"),
        ({"cu_seqlens": (0, 20)}, "it rises from 0 to the sequence's length, 21"),
        ({"k": torch.randn(1, 21, 3, 8), "v": torch.randn(1, 21, 3, 8)}, "num_heads is a multiple of num_kv_heads"),
        ({"v": torch.randn(1, 21, 2, 8, dtype=torch.float64)}, "one floating dtype"),
    ],
)
def test_what_does_not_go_together_is_refused(change, reason):
    (q, k, v, _), is_landmark, _ = make_inputs("blocks of 4", (4, 2), 8, torch.float32)
    arguments = {"q": q, "k": k, "v": v, "is_landmark": is_landmark} | change
    with pytest.raises(ValueError, match=reason):
        longctx.landmark_attention(**arguments)
