"""The tiled loss is cross entropy, with its gradients, and never has the logits of more than a tile."""

import pytest
import torch

from longctx.training.tiled_loss import IGNORED, tiled_cross_entropy
from tests.longctx.training.live_memory import LiveMemory

NUM_TOKENS, HIDDEN_SIZE, VOCAB_SIZE = 37, 12, 50


def make_inputs(dtype=torch.float64, *, num_tokens=NUM_TOKENS, vocab_size=VOCAB_SIZE, ignored=(3, 4, 5, 36)):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    targets[list(ignored)] = IGNORED
    return [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)], targets


def plain(hidden, weight, bias, targets):
    """As transformers does it."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def tiled(hidden, weight, bias, targets, tile, scale=1.0):
    return tiled_cross_entropy(hidden, weight, targets, tile=tile, scale=scale, bias_V=bias)


def differentiate(loss, inputs):
    return torch.autograd.grad(loss, [tensor for tensor in inputs if tensor is not None])


@pytest.mark.parametrize("tile", [0, 1, 8, 33, 1000])
@pytest.mark.parametrize("has_bias", [True, False])
def test_loss_and_gradients_are_those_of_cross_entropy(tile, has_bias):
    inputs, targets = make_inputs()
    inputs[2] = inputs[2] if has_bias else None
    expected, found = plain(*inputs, targets), tiled(*inputs, targets, tile)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for mine, theirs in zip(differentiate(0.3 * found, inputs), differentiate(0.3 * expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_loss_is_scaled():
    inputs, targets = make_inputs()
    expected, found = 0.02 * plain(*inputs, targets), tiled(*inputs, targets, 8, 0.02)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for mine, theirs in zip(differentiate(found, inputs), differentiate(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    inputs, targets = make_inputs(num_tokens=6, vocab_size=9, ignored=(2,))
    assert torch.autograd.gradcheck(lambda *given: tiled(*given, targets, 4), inputs)


@pytest.mark.parametrize("tile", [5, 64])
def test_bfloat16_is_no_worse_than_without_tiles(tile):
    inputs, targets = make_inputs(torch.bfloat16, num_tokens=256, vocab_size=300)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    losses = tiled(*inputs, targets, tile, 1 / 252), plain(*inputs, targets) / 252
    expected = plain(*exact, targets) / 252
    assert losses[0].dtype == torch.float32
    errors = [abs(loss.item() - expected.item()) for loss in losses]
    assert errors[0] <= errors[1] + 1e-6 * expected.item()
    (mine, theirs), exactly = (differentiate(loss, inputs) for loss in losses), differentiate(expected, exact)
    for a, b, c in zip(mine, theirs, exactly, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - c).norm() <= 1.1 * (b.double() - c).norm()


def test_frozen_weights_get_no_gradient_and_cost_none():
    (hidden, weight, bias), targets = make_inputs()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    with LiveMemory() as memory:
        loss = tiled(hidden, weight, bias, targets, 4)
    assert memory.largest_bytes < weight.nbytes
    (found,) = torch.autograd.grad(loss, [hidden])
    (expected,) = torch.autograd.grad(plain(hidden, weight, bias, targets), [hidden])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_logits_exist_for_one_tile():
    inputs, targets = make_inputs(torch.float32, num_tokens=512, vocab_size=400)
    with LiveMemory() as memory:
        tiled(*inputs, targets, 16).backward()
    with LiveMemory() as plainly:
        plain(*inputs, targets).backward()
    assert memory.largest_bytes <= 16 * 400 * 4
    assert memory.peak_bytes < 0.2 * plainly.peak_bytes


def test_without_gradients_none_is_computed():
    inputs, targets = make_inputs(torch.float32, num_tokens=64, vocab_size=400)
    with torch.no_grad(), LiveMemory() as memory:
        loss = tiled(*inputs, targets, 4)
    assert not loss.requires_grad
    assert memory.largest_bytes < inputs[1].nbytes


def test_no_token_counts():
    inputs, targets = make_inputs()
    loss = tiled(*inputs, torch.full_like(targets, IGNORED), 8)
    assert loss.item() == 0
    assert all(not grad.any() for grad in differentiate(loss, inputs))


def test_mistakes_are_named():
    (hidden, weight, _), targets = make_inputs()
    for arguments, words in (
        ((hidden, weight[:, 1:], targets), r"\[N, C\], \[V, C\], \[N\]"),
        ((hidden, weight, targets[1:]), r"\[N, C\], \[V, C\], \[N\]"),
        ((hidden, weight.float(), targets), "one dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            tiled_cross_entropy(*arguments, tile=4)
    with pytest.raises(ValueError, match=r"tile=-1 and scale=1\.0 are not allowed"):
        tiled_cross_entropy(hidden, weight, targets, tile=-1)
