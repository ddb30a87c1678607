"""A whole group in one process: shards global tensors, runs the plan's ranks in turn, puts the results together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from parallel.carrier import Carrier, VirtualNetwork, drive_together
from parallel.links import LinkModel
from parallel.mask import Mask
from parallel.plan import Plan, make_problem
from parallel.planner import make_plan
from parallel.shard import token_positions
from parallel.tile_attention import TileKernel, choose_kernel
from parallel.tile_exchange import Backward, Forward


@dataclass(frozen=True, slots=True)
class Result:
    """Whole-sequence results, and what travelled."""

    out: torch.Tensor
    lse: torch.Tensor  # [B, H, S]
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    plan: Plan
    forward_bytes: dict[tuple[int, int], int]
    backward_bytes: dict[tuple[int, int], int]


def run_virtual_ranks(
    inputs: tuple[torch.Tensor, ...],
    mask: Mask,
    plan_name: str,
    *,
    world_size: int,
    layout: str,
    num_nodes: int = 1,
    kernel: TileKernel | None = None,
    watch: Callable[[Carrier], Carrier] = lambda carrier: carrier,
) -> Result:
    """Attention and its gradients of ``(q, k, v, dout)`` over ``world_size`` virtual ranks."""
    q, k, v, dout = inputs
    problem = make_problem(
        mask,
        q.shape[1],
        k.shape[1],
        (q.shape[2], k.shape[2], q.shape[3]),
        world_size=world_size,
        layout=layout,
        batch_size=q.shape[0],
        element_size=q.element_size(),
        num_nodes=num_nodes,
    )
    plan, scale = make_plan(plan_name, problem, LinkModel()), q.shape[-1] ** -0.5
    kernel = kernel or choose_kernel(q.device, q.dtype, q.shape[-1])
    q_rows = [token_positions(spans) - (k.shape[1] - q.shape[1]) for spans in problem.q_layout]
    kv_rows = [token_positions(spans) for spans in problem.kv_layout]
    network = VirtualNetwork(world_size)
    forwards = [
        Forward(plan, rank, watch(network.carrier(rank)), kernel, q[:, rows], k[:, columns], v[:, columns], scale)
        for rank, (rows, columns) in enumerate(zip(q_rows, kv_rows, strict=True))
    ]
    drive_together([forward.run() for forward in forwards])
    forward_bytes, network = network.bytes_between, VirtualNetwork(world_size)
    backwards = []
    for rank, (rows, columns) in enumerate(zip(q_rows, kv_rows, strict=True)):
        forward, dout_local = forwards[rank], dout[:, rows]
        delta = (dout_local.to(forward.out.dtype) * forward.out).sum(-1)
        local = (q[:, rows], k[:, columns], v[:, columns], dout_local, forward.lse, delta)
        backwards.append(Backward(plan, rank, watch(network.carrier(rank)), kernel, *local, scale, forward.kept))
    drive_together([backward.run() for backward in backwards])
    gradients = (
        _join([backward.dq for backward in backwards], q_rows),
        _join([backward.dk for backward in backwards], kv_rows),
        _join([backward.dv for backward in backwards], kv_rows),
    )
    out, lse = _join([f.out for f in forwards], q_rows), _join([f.lse for f in forwards], q_rows)
    return Result(out, lse.transpose(1, 2), gradients, plan, forward_bytes, network.bytes_between)


def _join(parts: list[torch.Tensor], rows: list[torch.Tensor]) -> torch.Tensor:
    joined = torch.cat(parts, 1)
    return torch.empty_like(joined).index_copy_(1, torch.cat(rows).to(joined.device), joined)
