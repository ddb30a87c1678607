"""On a GPU: kernels, the merge and every plan on virtual ranks, against float64; NCCL where there are two GPUs.

bfloat16 throughout. The measure is the kernel over the whole sequence: its own error, and a rounding of every tile.
"""

from itertools import product

import pytest
import torch
import torch.distributed as dist

import longctx
from parallel import attention
from parallel.carrier import ExchangeError
from parallel.mask import Mask, Tile
from parallel.merge import choose_merge
from parallel.plans import PLANS
from parallel.shard import shard_sequence
from parallel.tile_attention import TILE_ATTENTION, attend_tile_, choose_kernel, differentiate_tile_
from tests.parallel.cells import CELLS, relative_error
from tests.parallel.dense_reference import dense_attention
from tests.parallel.gloo_ranks import run_ranks
from tests.parallel.merge_reference import make_case, merge_reference
from tests.parallel.test_exchange import LAYOUT, reference_of
from tests.parallel.virtual_ranks import run_virtual_ranks

pytestmark = pytest.mark.gpu

KERNELS = ("flash_attn", "torch_flash")
TILES = {
    "full": Tile(0, 200, 0, 333),
    "causal": Tile(0, 257, 0, 257, high=0),
    "bottom right": Tile(0, 100, 0, 300, high=200),
    "past the corner": Tile(0, 300, 0, 100, high=40),
    "band": Tile(0, 256, 0, 300, low=5, high=60),
    "band to the left": Tile(0, 256, 0, 256, low=-30, high=0),
    "one row": Tile(0, 1, 0, 77),
}
MOST = 2**-7  # a bfloat16 result over a few bfloat16 tiles


@pytest.fixture(params=KERNELS)
def kernel(request):
    """A kernel that runs here."""
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if reason := TILE_ATTENTION.get(request.param).unsupported(device, torch.bfloat16, 64):
        pytest.skip(reason)
    return choose_kernel(device, torch.bfloat16, 64, request.param)


@pytest.mark.parametrize("name", list(TILES))
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_tile_equals_the_formula(kernel, name, heads, head_dim):
    tile, generator = TILES[name], torch.Generator().manual_seed(0)
    shapes = [(tile.q_stop, heads[0]), (tile.kv_stop, heads[1]), (tile.kv_stop, heads[1]), (tile.q_stop, heads[0])]
    q, k, v, dout = (torch.randn(2, rows, h, head_dim, generator=generator).bfloat16().cuda() for rows, h in shapes)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    rows, columns = torch.arange(tile.q_stop)[:, None], torch.arange(tile.kv_stop)[None]
    hidden = ((columns < rows + tile.low) | (columns > rows + tile.high)).cuda()
    scale, group_size = head_dim**-0.5, heads[0] // heads[1]
    wide = [x.repeat_interleave(group_size, 2) for x in exact[1:]]
    scores = (torch.einsum("bihd,bjhd->bhij", exact[0], wide[0]) * scale).masked_fill(hidden, float("-inf"))
    expected, expected_lse = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), wide[1]), scores.logsumexp(-1)
    expected.backward(dout.double())

    out, lse = torch.zeros(q.shape, device="cuda"), torch.full(q.shape[:3], float("-inf"), device="cuda")
    attend_tile_(kernel, tile, q, k, v, out, lse, scale)
    assert relative_error(out, expected.detach()) <= MOST
    assert relative_error(lse, expected_lse.detach().transpose(1, 2)) <= 1e-4
    grads = [torch.zeros(x.shape, device="cuda") for x in (q, k, v)]
    delta = (dout.float() * out).sum(-1)
    differentiate_tile_(kernel, tile, dout, q, k, v, lse, delta, *grads, scale)
    for grad, x in zip(grads, exact, strict=True):
        assert relative_error(grad, x.grad) <= MOST


@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_cell_equals_dense_attention(kernel, plan, world_size):
    for cell in CELLS:
        inputs, out, lse, gradients = reference_of(cell, torch.bfloat16)
        result = run_virtual_ranks(
            tuple(x.cuda() for x in inputs),
            cell.mask,
            plan,
            world_size=world_size,
            layout=LAYOUT.get(cell.mask_name, "zigzag"),
            num_nodes=2 if world_size == 4 else 1,
            kernel=kernel,
        )
        assert relative_error(result.out.cpu(), out) <= MOST, cell
        seen = torch.isfinite(lse)
        assert relative_error(result.lse.cpu()[seen], lse[seen]) <= 1e-4, cell
        least = 0.3 * inputs[3].double().norm().item()
        for gradient, expected in zip(result.gradients, gradients, strict=True):
            assert relative_error(gradient.cpu(), expected, least=least) <= MOST, cell


@pytest.mark.parametrize("plan", ["token_ring", "kv_ring", "ulysses", "fewest_bytes"])
def test_error_does_not_grow_with_ranks(kernel, plan):
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(1, 2048, heads, 64, generator=generator).bfloat16().cuda() for heads in (6, 2, 2, 6))
    exact = [x.cpu().double().requires_grad_() for x in inputs[:3]]
    out, _ = dense_attention(*exact, Mask(), 0.125)
    out.backward(inputs[3].cpu().double())
    expected = (out.detach(), *(x.grad for x in exact))
    errors = {}
    for world_size in (1, 8, 64):
        result = run_virtual_ranks(inputs, Mask(), plan, world_size=world_size, layout="zigzag", kernel=kernel)
        values = (result.out, *result.gradients)
        errors[world_size] = [relative_error(v.cpu(), e) for v, e in zip(values, expected, strict=True)]
    for one, many in zip(errors[1], errors[64], strict=True):
        assert many <= 2 * max(one, 2**-9)


@pytest.mark.parametrize("partial_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["whole", "cut", "transposed"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 37, 6, 16), (1, 300, 8, 128), (3, 4, 1, 80)])
def test_the_triton_merge_is_exact(shape, layout, partial_dtype):
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    case = make_case(shape, torch.float32, partial_dtype, layout, "cuda")
    expected_out, expected_lse = merge_reference(*case)
    out, lse, *partial = case
    choose_merge("cuda")(out, lse, *partial)
    torch.testing.assert_close(out, expected_out.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float())


def test_what_flash_does_not_take_is_refused():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with pytest.raises(ValueError, match="it takes float16 and bfloat16, not float32"):
        choose_kernel(torch.device("cuda"), torch.float32, 64)


def attend_over_nccl(rank, world_size, _folder, plans):
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    for plan, causal in product(plans, (True, False)):
        generator = torch.Generator().manual_seed(0)
        whole = [torch.randn(1, 1001, heads, 64, generator=generator).bfloat16() for heads in (8, 2, 2, 8)]
        *inputs, dout = (shard_sequence(x, 1, rank=rank, world_size=world_size)[0].cuda() for x in whole)
        inputs = [x.requires_grad_() for x in inputs]
        out = longctx.sequence_parallel_attention(*inputs, group=group, plan=plan, causal=causal, timeout_s=60.0)
        out.backward(dout)
        exact = [x.double().requires_grad_() for x in whole[:3]]
        expected, _ = dense_attention(*exact, Mask(causal), 0.125)
        expected.backward(whole[3].double())
        references = (expected.detach(), *(x.grad for x in exact))
        for value, reference in zip((out.detach(), *(x.grad for x in inputs)), references, strict=True):
            own, _ = shard_sequence(reference, 1, rank=rank, world_size=world_size)
            assert relative_error(value.cpu(), own) <= MOST, (plan, causal)
    return True


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_ranks_over_nccl_equal_dense_attention():
    assert run_ranks(attend_over_nccl, 2, list(PLANS), uses_gpu=True) == [True, True]


def attend_alone(rank, world_size, _folder):
    """Rank 1 agrees to the call and then is not there; both go on with a new group."""
    torch.cuda.set_device(rank)
    q = torch.randn(1, 64, 2, 64, device="cuda").bfloat16()
    run, text = attention.Forward.run, ""
    if rank == 1:
        attention.Forward.run = lambda self: iter(())
    try:
        longctx.token_ring_attention(q, q, q, group=dist.new_group(backend="nccl"), timeout_s=2.0)
    except ExchangeError as error:
        text = str(error)
    attention.Forward.run = run
    assert longctx.token_ring_attention(q, q, q, group=dist.new_group(backend="nccl")).isfinite().all()
    return text


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_a_stalled_peer_is_named_and_the_group_is_made_anew(monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # else torch ends the process with the group
    first, second = run_ranks(attend_alone, 2, uses_gpu=True)
    assert "rank 0, step 0: could not" in first and "rank 1" in first
    assert second == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tensors_that_a_group_cannot_carry_are_refused():
    (text,) = run_ranks(attend_over_gloo, 1, uses_gpu=True)
    assert text == "q on cuda is not allowed: the group carries tensors on cpu"


def attend_over_gloo(rank, world_size, _folder):
    q = torch.randn(1, 64, 2, 64, device="cuda").bfloat16()
    try:
        longctx.token_ring_attention(q, q, q, group=None)
    except ValueError as error:
        return str(error)
    return ""
