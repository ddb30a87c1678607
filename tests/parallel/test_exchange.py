"""Every plan, on every cell of the grid, equals dense attention in float64, gradients too; and moves what it says."""

import pytest
import torch

from parallel.carrier import Carrier, ExchangeError
from parallel.plans import PLANS
from tests.parallel.cells import CELLS, Cell, relative_error
from tests.parallel.dense_reference import dense_attention
from tests.parallel.virtual_ranks import run_virtual_ranks

LAYOUT = {"packed": "balanced", "packed_window": "striped", "window": "contiguous"}


def reference_of(cell: Cell, dtype: torch.dtype = torch.float32):
    """Inputs, and output, log-sum-exp and gradients in float64."""
    inputs = cell.make_inputs(dtype)
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    out, lse = dense_attention(q, k, v, cell.mask, inputs[0].shape[-1] ** -0.5)
    out.backward(inputs[3].double())
    return inputs, out.detach(), lse.detach(), (q.grad, k.grad, v.grad)


@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_every_cell_equals_dense_attention(plan, world_size):
    for cell in CELLS:
        inputs, out, lse, gradients = reference_of(cell)
        result = run_virtual_ranks(
            inputs,
            cell.mask,
            plan,
            world_size=world_size,
            layout=LAYOUT.get(cell.mask_name, "zigzag"),
            num_nodes=2 if world_size == 4 else 1,
        )
        assert relative_error(result.out, out) <= 2e-6, cell
        seen = torch.isfinite(lse)
        assert relative_error(result.lse[seen], lse[seen]) <= 2e-6, cell
        least = 0.3 * inputs[3].double().norm().item()
        for gradient, expected in zip(result.gradients, gradients, strict=True):
            assert relative_error(gradient, expected, least=least) <= 2e-6, cell
        plan_bytes = result.plan.bytes_between(), result.plan.bytes_between(backward=True)
        assert (result.forward_bytes, result.backward_bytes) == plan_bytes, cell


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["token_ring", "kv_ring", "ulysses"])
def test_every_dtype_moves_what_the_plan_says(plan, dtype):
    cell = Cell("causal", "gqa", "even")
    inputs = tuple(x.to(dtype) for x in cell.make_inputs())
    result = run_virtual_ranks(inputs, cell.mask, plan, world_size=3, layout="zigzag")
    assert result.forward_bytes == result.plan.bytes_between()
    assert result.backward_bytes == result.plan.bytes_between(backward=True)


@pytest.mark.parametrize(
    "plan, world_size",
    [
        *((plan, 12) for plan in PLANS),
        pytest.param("token_ring", 64, marks=pytest.mark.slow),
    ],
)
def test_error_does_not_grow_with_ranks(plan, world_size):
    cell = Cell("causal", "gqa", "even")
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(1, 640, heads, 16, generator=generator) for heads in (6, 2, 2, 6))
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    out, _ = dense_attention(q, k, v, cell.mask, 0.25)
    out.backward(inputs[3].double())
    result = run_virtual_ranks(inputs, cell.mask, plan, world_size=world_size, layout="zigzag", num_nodes=1)
    assert relative_error(result.out, out.detach()) <= 2e-6
    for gradient, expected in zip(result.gradients, (q.grad, k.grad, v.grad), strict=True):
        assert relative_error(gradient, expected) <= 2e-6


@pytest.mark.parametrize(
    "plan, world_size", [("token_ring", 16), ("kv_ring", 32), ("ulysses", 6), ("fewest_bytes", 4), ("token_ring", 4)]
)
def test_bfloat16_is_as_good_as_one_kernel(plan, world_size):
    """One unsharded kernel over the same bfloat16 inputs is the measure; sharding adds at most a tenth to its error."""
    cell = Cell("causal", "gqa", "even")
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(1, 512, heads, 64, generator=generator).bfloat16() for heads in (6, 2, 2, 6))
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    out, _ = dense_attention(q, k, v, cell.mask, 0.125)
    out.backward(inputs[3].double())
    expected = (out.detach(), q.grad, k.grad, v.grad)
    one = [x.detach().transpose(1, 2).requires_grad_() for x in inputs[:3]]
    one_out = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
    one_out.backward(inputs[3].transpose(1, 2))
    unsharded = [x.transpose(1, 2) for x in (one_out.detach(), *(x.grad for x in one))]
    result = run_virtual_ranks(inputs, cell.mask, plan, world_size=world_size, layout="zigzag")
    for ours, theirs, exact in zip((result.out, *result.gradients), unsharded, expected, strict=True):
        assert relative_error(ours.bfloat16(), exact) <= 1.1 * relative_error(theirs, exact)


def test_a_peer_that_is_gone_when_a_message_is_posted_is_named_with_the_step():
    cell = Cell("causal", "gqa", "even")

    def watch(carrier: Carrier) -> Carrier:
        posted, post = [], carrier.post

        def fail_in_step_1(sends, receives):
            posted.append(1)
            if carrier.rank == 1 and len(posted) == 2:
                raise ExchangeError("rank 1 could not send to rank 2: it is gone")
            return post(sends, receives)

        carrier.post = fail_in_step_1
        return carrier

    with pytest.raises(ExchangeError, match="rank 1, step 1: rank 1 could not send to rank 2: it is gone"):
        run_virtual_ranks(cell.make_inputs(), cell.mask, "kv_ring", world_size=3, layout="zigzag", watch=watch)
