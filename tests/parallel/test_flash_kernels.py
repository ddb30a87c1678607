"""The GPU kernels' calls, checked on a CPU: the kernels are replaced by their documented meaning in float64.

What this cannot show is that the kernels themselves run; ``test_gpu.py`` does.
"""

import sys
from types import ModuleType

import pytest
import torch

from parallel import torch_flash
from parallel.delta import output_with
from parallel.flash_attn import FlashAttn
from parallel.mask import Mask, Tile
from parallel.plans import PLANS
from parallel.tile_attention import attend_tile_, choose_kernel
from parallel.torch_flash import TorchFlash
from tests.parallel import documented_flash
from tests.parallel.cells import CELLS, relative_error
from tests.parallel.test_exchange import LAYOUT, reference_of
from tests.parallel.virtual_ranks import run_virtual_ranks


def package_forward(q, k, v, *, dropout_p, softmax_scale, causal, window_size, return_attn_probs):
    assert dropout_p == 0 and return_attn_probs
    return *documented_flash.attend(q, k, v, scale=softmax_scale, causal=causal, window=window_size), None


def package_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    assert dropout_p == softcap == 0 and alibi_slopes is None and not deterministic
    window = window_size_left, window_size_right
    grads = documented_flash.differentiate(
        dout, q, k, v, out, softmax_lse, scale=softmax_scale, causal=causal, window=window
    )
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad)


def operator_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, causal, debug, **named):
    assert cu_q is None and cu_k is None and dropout_p == 0 and not debug
    assert (max_q, max_k) == (q.shape[1], k.shape[1])
    window = named.pop("window_size_left"), named.pop("window_size_right")
    return *documented_flash.attend(q, k, v, causal=causal, window=window, **named), None, None, None


def operator_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, causal, rng, unused, **named):
    assert cu_q is None and cu_k is None and dropout_p == 0 and rng.dtype == torch.uint64
    assert (max_q, max_k) == (q.shape[1], k.shape[1])
    window = named.pop("window_size_left"), named.pop("window_size_right")
    return documented_flash.differentiate(dout, q, k, v, out, lse, causal=causal, window=window, **named)


@pytest.fixture(params=["flash_attn", "torch_flash"])
def kernel(request, monkeypatch):
    """A GPU kernel's class over a stand-in."""
    if request.param == "torch_flash":
        monkeypatch.setattr(torch_flash, "_flash", operator_forward)
        monkeypatch.setattr(torch_flash, "_flash_backward", operator_backward)
        return TorchFlash()
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.flash_attn_func, interface._flash_attn_backward = package_forward, package_backward
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    return FlashAttn()


@pytest.mark.parametrize("plan", list(PLANS))
def test_calls_mean_dense_attention(kernel, plan):
    for cell in CELLS[list(PLANS).index(plan) % 3 :: 3]:
        inputs, out, lse, gradients = reference_of(cell)
        layout = LAYOUT.get(cell.mask_name, "zigzag")
        result = run_virtual_ranks(inputs, cell.mask, plan, world_size=3, layout=layout, kernel=kernel)
        assert relative_error(result.out, out) <= 2e-6, cell
        seen = torch.isfinite(lse)
        assert relative_error(result.lse[seen], lse[seen]) <= 2e-6, cell
        least = 0.3 * inputs[3].double().norm().item()
        for gradient, expected in zip(result.gradients, gradients, strict=True):
            assert relative_error(gradient, expected, least=least) <= 2e-6, cell


@pytest.mark.parametrize("world_size", [4, pytest.param(32, marks=pytest.mark.slow)])
def test_half_precision_partials_do_not_lose_more_with_ranks(kernel, world_size):
    """bfloat16 outputs of every tile, merged in float32: less than two roundings of a bfloat16 result."""
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(1, 256, heads, 64, generator=generator).bfloat16() for heads in (6, 2, 2, 6))
    exact = [x.double() for x in inputs]
    one = run_virtual_ranks(tuple(exact), Mask(), "kv_ring", world_size=1, layout="zigzag")
    ours = run_virtual_ranks(inputs, Mask(), "token_ring", world_size=world_size, layout="zigzag", kernel=kernel)
    for value, expected in zip((ours.out, *ours.gradients), (one.out, *one.gradients), strict=True):
        assert relative_error(value, expected) <= 2**-8


@pytest.mark.parametrize(
    "tile, num_calls",
    [
        (Tile(0, 7, 0, 7, high=0), 1),
        (Tile(0, 5, 0, 9, high=4), 1),
        (Tile(0, 9, 0, 5, high=0), 1),
        (Tile(0, 9, 0, 5, high=1), 2),
        (Tile(0, 9, 0, 5, low=-7, high=3), 2),
        (Tile(0, 12, 0, 4, low=-8, high=2), 2),
        (Tile(0, 6, 0, 9, low=1, high=5), 1),
        (Tile(0, 8, 0, 6, low=-2, high=3), 1),
        (Tile(0, 1, 0, 4), 1),
    ],
)
def test_a_tile_is_one_call_unless_its_bound_would_be_taken_for_none(kernel, tile, num_calls):
    q, k = torch.randn(2, tile.q_stop, 4, 16), torch.randn(2, tile.kv_stop, 2, 16)
    assert len(list(kernel.blocks(tile))) == num_calls
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"))
    attend_tile_(kernel, tile, q, k, k, out, lse, 0.25)
    rows, columns = torch.arange(tile.q_stop)[:, None], torch.arange(tile.kv_stop)[None]
    hidden = (columns < rows + tile.low) | (columns > rows + tile.high)
    scores = torch.einsum("bihd,bjhd->bihj", q, k.repeat_interleave(2, 2)) * 0.25
    scores = scores.masked_fill(hidden[None, :, None], float("-inf"))
    expected = torch.einsum("bihj,bjhd->bihd", scores.softmax(-1), k.repeat_interleave(2, 2))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_delta_travels_instead_of_the_output(dtype):
    generator = torch.Generator().manual_seed(0)
    dout, out = (torch.randn(3, 50, 4, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    dout *= torch.logspace(-6, 3, 50, dtype=torch.float64)[:, None, None]
    dout[0, 0] = 0
    dout = dout.to(dtype)
    delta = (dout.double() * out).sum(-1, keepdim=True)
    given = delta if dtype == torch.float64 else delta.float()
    made = output_with(given, dout)
    assert made.dtype == dtype and torch.isfinite(made).all()
    size = (dout.double().square().sum(-1) * out.square().sum(-1)).sqrt()
    error = ((dout.double() * made.double()).sum(-1) - delta[..., 0]).abs()
    assert (error <= torch.finfo(dtype).eps * size).all()


def test_operators_take_the_arguments():
    """Shapes through torch's own operators, on its meta device: fewer KV heads, no cumulative lengths."""
    named = {"device": "meta", "dtype": torch.bfloat16}
    q, k = torch.empty(2, 7, 6, 64, **named), torch.empty(2, 9, 2, 64, **named)
    kernel = TorchFlash()
    (block,) = kernel.blocks(Tile(0, 7, 0, 9, high=2))
    out, lse = kernel.forward(q, k, k, block, 0.125)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:3], torch.float32)
    dq, dk, dv = kernel.backward(q, q, k, k, lse, lse, block, 0.125)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)


@pytest.mark.parametrize(
    "device, dtype, head_dim, name, reasons",
    [
        (
            "cuda",
            torch.float32,
            64,
            "auto",
            ["it takes float16 and bfloat16, not float32", "cpu_flash: it runs on a CPU"],
        ),
        ("cuda", torch.bfloat16, 60, "auto", ["head_dim is 60; it takes multiples of 8 up to 256"]),
        ("cuda", torch.bfloat16, 64, "flash_attn", ["the flash-attn package is not installed"]),
        ("cpu", torch.bfloat16, 64, "torch_flash", ["it runs on a GPU, not on cpu"]),
        ("cpu", torch.bfloat16, 64, "flash", ["allowed: cpu_flash, flash_attn, torch_flash"]),
    ],
)
def test_what_cannot_run_says_what_can(device, dtype, head_dim, name, reasons, monkeypatch):
    monkeypatch.setattr("parallel.flash_attn.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r".") as caught:
        choose_kernel(torch.device(device), dtype, head_dim, name)
    for reason in reasons:
        assert reason in str(caught.value)


def test_a_cpu_gets_its_kernel():
    kernel = choose_kernel(torch.device("cpu"), torch.float32, 17)
    assert type(kernel).__name__ == "CpuFlash"
