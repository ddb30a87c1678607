"""Linear layers in every form against a product in float64."""

import pytest
import torch
import torch.nn.functional as F

from longctx.models.linear import NATIVE_ROWS, WideningLinear, make_linear

SHAPES = [(1, 64, 96), (3, 768, 257), (NATIVE_ROWS, 128, 31), (NATIVE_ROWS + 1, 128, 31), (5, 100, 40), (70, 100, 40)]


def draw(num_rows: int, in_features: int, out_features: int, dtype: torch.dtype, has_bias: bool):
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, in_features, generator=generator).to(dtype)
    weight = (torch.randn(out_features, in_features, generator=generator) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype) if has_bias else None
    return x, weight, bias


@pytest.mark.parametrize("make", [make_linear, WideningLinear])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "in_features", "out_features"), SHAPES)
def test_equals_the_product_in_float64(make, has_bias, dtype, num_rows, in_features, out_features):
    if make is WideningLinear and dtype != torch.bfloat16:
        pytest.skip("it takes bfloat16")
    x, weight, bias = draw(num_rows, in_features, out_features, dtype, has_bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    got = make(weight, bias)(x)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=2 * epsilon, atol=4 * epsilon + 1e-5)


def test_few_rows_do_not_depend_on_each_other():
    x, weight, bias = draw(NATIVE_ROWS, 256, 64, torch.bfloat16, True)
    layer = WideningLinear(weight, bias)
    together = layer(x)
    for count in (1, 2, 3, 5, 11):
        assert torch.equal(layer(x[:count]), together[:count])


def test_many_rows_in_parts(monkeypatch):
    x, weight, bias = draw(NATIVE_ROWS + 9, 64, 50, torch.bfloat16, True)
    whole = WideningLinear(weight, bias)(x)
    monkeypatch.setattr("longctx.models.linear.WIDENED_BYTES", 64 * 4 * 7)
    torch.testing.assert_close(WideningLinear(weight, bias)(x), whole)
