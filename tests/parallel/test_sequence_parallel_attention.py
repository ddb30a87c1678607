"""The public call on real gloo ranks: exact, differentiable, clear about mistakes, and alive after a rank died."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

import longctx
from parallel.carrier import ExchangeError
from parallel.plan import make_problem
from parallel.plans import PLANS
from parallel.shard import token_positions
from tests.parallel.cells import CELLS, Cell, relative_error
from tests.parallel.dense_reference import dense_attention
from tests.parallel.gloo_ranks import join_group, run_ranks

LAYOUT = {"packed": "balanced", "packed_window": "striped"}


def local_rows(cell: Cell, layout: str, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of the queries, and of the keys."""
    problem = make_problem(cell.mask, cell.num_q, cell.num_kv, (1, 1, 1), world_size=world_size, layout=layout)
    rows, columns = (token_positions(spans[rank]) for spans in (problem.q_layout, problem.kv_layout))
    return rows - (cell.num_kv - cell.num_q), columns


def attend(cell: Cell, plan: str, rank: int, world_size: int, **more):
    """This rank's inputs, output and rows."""
    layout = LAYOUT.get(cell.mask_name, "zigzag")
    q, k, v, dout = cell.make_inputs()
    rows, columns = local_rows(cell, layout, rank, world_size)
    inputs = [q[:, rows].requires_grad_(), k[:, columns].requires_grad_(), v[:, columns].requires_grad_()]
    mask = cell.mask
    out, lse = longctx.sequence_parallel_attention(
        *inputs,
        group=None,
        plan=plan,
        causal=mask.causal,
        cu_seqlens=mask.cu_seqlens,
        window=mask.window,
        window_group=mask.window_group,
        layout=layout,
        return_lse=True,
        **more,
    )
    return inputs, out, lse, dout[:, rows], rows, columns


def check_cells(rank, world_size, _folder, cells, plans):
    worst = 0.0
    for cell in cells:
        q, k, v, dout = cell.make_inputs()
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        expected, expected_lse = dense_attention(*exact, cell.mask, q.shape[-1] ** -0.5)
        expected.backward(dout.double())
        least = 0.3 * dout.norm().item()
        for plan in plans:
            nodes = {"num_nodes": 2} if world_size % 2 == 0 else {}
            inputs, out, lse, dout_local, rows, columns = attend(cell, plan, rank, world_size, **nodes)
            out.backward(dout_local)
            errors = [
                relative_error(out.detach(), expected.detach()[:, rows], least=0.1),
                relative_error(lse, expected_lse.detach()[:, :, rows], least=0.1),
                relative_error(inputs[0].grad, exact[0].grad[:, rows], least=least),
                relative_error(inputs[1].grad, exact[1].grad[:, columns], least=least),
                relative_error(inputs[2].grad, exact[2].grad[:, columns], least=least),
            ]
            assert max(errors) <= 2e-6, (str(cell), plan, errors)
            worst = max(worst, *errors)
    return worst


@pytest.mark.parametrize("world_size, step", [(1, 4), (2, 7), (3, 9), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_every_plan_is_exact_on_real_ranks(world_size, step):
    cells = CELLS[::step]
    assert len(run_ranks(check_cells, world_size, cells, list(PLANS))) == world_size


BAD = {
    "a fraction of a window": ({"window": 1.5}, "window=1.5 is not allowed: a whole number"),
    "fractions of tokens": ({"cu_seqlens": torch.tensor([0, 20.7, 48])}, "is not allowed: whole numbers"),
    "one number": ({"cu_seqlens": 48}, "cu_seqlens=48 is not allowed: whole numbers"),
    "rows of boundaries": ({"cu_seqlens": torch.tensor([[0, 48]])}, "is not allowed: whole numbers"),
    "infinite scale": ({"scale": float("inf")}, "scale=inf is not allowed: a number above 0"),
    "a word for a scale": ({"scale": "big"}, "scale=big is not allowed: a number above 0"),
    "no nodes": ({"num_nodes": 0}, "num_nodes=0 is not allowed: at least 1"),
    "no time": ({"timeout_s": 0}, "timeout_s=0 is not allowed: seconds, above 0"),
    "a file of links": ({"links": "links.json"}, "a LinkModel; parallel.links.load_links reads a file"),
    "trace into a file": ({"trace": __file__}, "is not allowed, a folder to write to: File exists"),
}


def call_with_mistakes(rank, world_size, _folder):
    cell = Cell("causal", "gqa", "even")
    q, k, v, _ = cell.make_inputs()
    rows, columns = local_rows(cell, "zigzag", rank, world_size)
    good = (q[:, rows], k[:, columns], v[:, columns])
    calls = {
        "plan": lambda: longctx.sequence_parallel_attention(*good, group=None, plan="tokenring"),
        "layout": lambda: longctx.sequence_parallel_attention(*good, group=None, layout="zig"),
        "window": lambda: longctx.sequence_parallel_attention(*good, group=None, causal=False, window=4),
        "heads": lambda: longctx.sequence_parallel_attention(good[0][:, :, :5], *good[1:], group=None),
        **{
            name: lambda arguments=arguments: longctx.sequence_parallel_attention(*good, group=None, **arguments)
            for name, (arguments, _) in BAD.items()
        },
        "no head dim": lambda: longctx.sequence_parallel_attention(*(x[..., :0] for x in good), group=None),
        "one rank alone": lambda: longctx.sequence_parallel_attention(
            good[0].half() if rank else good[0], *good[1:], group=None
        ),
        "other plans": lambda: longctx.token_ring_attention(*good, group=None, layout=("zigzag", "striped")[rank]),
        "lengths": lambda: longctx.sequence_parallel_attention(
            *(x[:, : x.shape[1] - 2 * rank] for x in good), group=None
        ),
    }
    texts = {}
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r".") as caught:
            call()
        texts[name] = str(caught.value)
    out = longctx.sequence_parallel_attention(*good, group=None)  # nothing is left in the way of the next call
    expected, _ = dense_attention(q, k, v, cell.mask, q.shape[-1] ** -0.5)
    assert relative_error(out, expected[:, rows]) <= 2e-6
    return texts


def test_mistakes_are_named_on_every_rank():
    first, second = run_ranks(call_with_mistakes, 2)
    assert "plan 'tokenring' is unknown; allowed: auto, all_gather" in first["plan"]
    assert "layout 'zig' is unknown; allowed: contiguous" in first["layout"]
    assert "a window looks back" in first["window"]
    assert "num_heads is a multiple of num_kv_heads" in first["heads"]
    assert "rank 1 refused its arguments" in first["one rank alone"]
    assert "one floating dtype for all three" in second["one rank alone"]
    assert "rank 1 was called with other arguments than rank 0" in first["other plans"]
    assert "the ranks hold [24, 22] queries; zigzag over 46 tokens" in first["lengths"]
    assert "head_dim is at least 1" in first["no head dim"]
    for name, (_, text) in BAD.items():
        assert text in first[name]
    for name in ("plan", "layout", "window", "heads", "lengths", "no head dim", *BAD):
        assert first[name] == second[name]


def lose_a_rank(rank, world_size, folder, fault):
    cell = Cell("causal", "gqa", "even")
    attend(cell, "token_ring", rank, world_size)  # connections are made
    if rank == 2:
        from parallel import cpu_flash

        real, calls = cpu_flash._flash, []

        def fail_in_the_second_step(*arguments, **named):
            calls.append(1)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            return real(*arguments, **named)

        cpu_flash._flash = fail_in_the_second_step
    began = time.monotonic()
    with pytest.raises(ExchangeError) as caught:
        attend(cell, "token_ring", rank, world_size, timeout_s=5.0)
    seconds = time.monotonic() - began
    dist.destroy_process_group()
    rank -= rank > 2
    join_group(folder, "second", rank, world_size - 1)
    _, out, _, _, rows, _ = attend(cell, "token_ring", rank, world_size - 1)
    q, k, v, _ = cell.make_inputs()
    expected, _ = dense_attention(q, k, v, cell.mask, q.shape[-1] ** -0.5)
    return str(caught.value), seconds, relative_error(out.detach(), expected[:, rows])


@pytest.mark.parametrize("fault", ["kill", pytest.param("freeze", marks=pytest.mark.slow)])
def test_a_lost_rank_is_named_and_the_group_is_made_anew(fault):
    results = run_ranks(lose_a_rank, 4, fault, num_lost=1)
    assert results[2] is None
    for rank in (0, 1, 3):
        text, seconds, error = results[rank]
        assert f"rank {rank}, step " in text
        assert "rank " in text.split("could not", 1)[1]
        assert seconds < 12
        assert error <= 2e-6
    assert any("rank 2" in results[rank][0].split("could not", 1)[1] for rank in (0, 1, 3))
