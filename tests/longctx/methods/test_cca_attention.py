"""CCA attention against its formulas in float64: ragged groups, packed documents, RoPE, gradients."""

import pytest
import torch

import longctx
from tests.longctx.methods.cca_reference import cca_reference

SIZES = [(4, 6), (4, 1), (1, 3), (5, 2), (16, 4), (2, 40)]
DOCUMENTS = {
    "one": (21, None),
    "whole groups": (16, None),
    "packed": (25, (0, 4, 5, 5, 20, 25)),
    "one token": (1, None),
}


def turn(x, position):
    """RoPE of any shape: ``[..., D]`` and positions ``[...]``."""
    half = x.shape[-1] // 2
    angles = torch.as_tensor(position, dtype=x.dtype)[..., None] * 10.0 ** -torch.arange(half, dtype=x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def make_inputs(length, heads, head_dim, dtype, batch):
    torch.manual_seed(length)
    shapes = [(batch, length, h, head_dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("group_size, window", SIZES)
@pytest.mark.parametrize("documents", list(DOCUMENTS))
@pytest.mark.parametrize(
    "heads, dtype, most",
    [((2, 2), torch.float64, 1e-10), ((4, 2), torch.float64, 1e-10), ((4, 2), torch.float32, 2e-5)],
    ids=["mha-fp64", "gqa-fp64", "gqa-fp32"],
)
def test_outputs_and_gradients_are_the_formulas(group_size, window, documents, heads, dtype, most):
    length, bounds = DOCUMENTS[documents]
    q, k, v, dout = make_inputs(length, heads, 8, dtype, 1 if bounds else 2)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    sizes = {"group_size": group_size, "window": window, "scale": 0.4}
    expected = cca_reference(*exact, **sizes, bounds=bounds or (0, length), rope=turn)
    expected.backward(dout.double())
    out = longctx.cca_attention(*inputs, **sizes, cu_seqlens=bounds, rope=turn)
    out.backward(dout)
    for value, reference in zip((out, *(x.grad for x in inputs)), (expected, *(x.grad for x in exact)), strict=True):
        assert value.dtype == dtype
        assert (value.double() - reference).abs().max() <= most * max(1.0, reference.abs().max())


@pytest.mark.parametrize("core_position", ["last", "middle", "mean"])
@pytest.mark.parametrize("head_pooling", ["weights", "query"])
def test_choices_of_cores(core_position, head_pooling):
    q, k, v, _ = make_inputs(31, (6, 2), 8, torch.float64, 2)
    choices = {"group_size": 4, "window": 5, "core_position": core_position, "head_pooling": head_pooling}
    expected = cca_reference(q, k, v, **choices, scale=8**-0.5, bounds=(0, 31), rope=turn)
    torch.testing.assert_close(longctx.cca_attention(q, k, v, **choices, rope=turn), expected, rtol=0, atol=1e-10)


def test_gradcheck():
    q, k, v, _ = make_inputs(10, (2, 1), 2, torch.float64, 1)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *x: longctx.cca_attention(*x, group_size=2, window=3, rope=turn, cu_seqlens=(0, 4, 10)), inputs
    )


def test_a_window_as_long_as_the_sequence_is_dense_attention():
    q, k, v, _ = make_inputs(40, (4, 2), 16, torch.float64, 2)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(longctx.cca_attention(q, k, v, group_size=8, window=40), dense)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"group_size": 0}, "group_size=0 is not allowed: tokens, at least 1"),
        ({"window": 0}, "window=0 is not allowed: tokens, at least 1"),
        ({"window": 2.5}, "window=2.5 is not allowed"),
        ({"core_position": "first"}, "core_position='first' is not allowed: last, middle, mean"),
        ({"head_pooling": "max"}, "head_pooling='max' is not allowed: weights, query"),
        ({"cu_seqlens": (0, 4)}, "it rises from 0 to the sequence's length, 12"),
    ],
)
def test_what_does_not_go_together_is_refused(change, reason):
    q, k, v, _ = make_inputs(12, (4, 2), 8, torch.float32, 1)
    with pytest.raises(ValueError, match=reason):
        longctx.cca_attention(q, k, v, **({"group_size": 4, "window": 4} | change))
