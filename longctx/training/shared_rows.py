"""Which of a shared sequence's tokens a rank holds, and how all ranks' rows are put together and added up.

Legend: S this rank's tokens, L those of the whole sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from parallel.layout import make_layout
from parallel.shard import token_positions


@dataclass(frozen=True, slots=True)
class Rows:
    """One rank's tokens, in the order in which it holds them; int64, on the CPU."""

    positions_S: torch.Tensor  # in the sequence, rising
    starts_S: torch.Tensor  # of each token's document
    lengths_S: torch.Tensor  # of each token's document
    places_L: torch.Tensor  # of every token of the sequence among all ranks' rows, each rank's filled up to num_rows
    num_rows: int  # of the rank that holds most


def check_call(method: str, q: torch.Tensor, *, causal: bool, window: int | None) -> None:
    """Raise ``ValueError`` for attention that is not causal or has a window of the model's, or a batch."""
    if not causal or window is not None:
        raise ValueError(
            f"causal={causal}, window={window} are not allowed: {method} attention takes causal models without windows"
        )
    if q.shape[0] != 1:
        raise ValueError(f"a batch of {q.shape[0]} is not allowed: {method} attention takes one sequence")


def find_rows(layout: str, documents: Sequence[int], group: dist.ProcessGroup | None) -> Rows:
    """This rank's of a sequence with these boundaries of documents."""
    return _find_rows(layout, tuple(documents), dist.get_world_size(group), dist.get_rank(group))


def gather_rows(x_S: torch.Tensor, rows: Rows, group: dist.ProcessGroup | None) -> torch.Tensor:
    """``[L, ...]`` of all ranks' ``[S, ...]``. Collective, without gradients."""
    world_size = dist.get_world_size(group)
    if world_size == 1:
        return x_S
    padded = x_S.new_zeros(rows.num_rows, *x_S.shape[1:])
    padded[: len(x_S)] = x_S
    whole = x_S.new_empty(world_size * rows.num_rows, *x_S.shape[1:])
    dist.all_gather_into_tensor(whole, padded, group=group)
    return whole[rows.places_L.to(x_S.device)]


def add_up_rows(x_L: torch.Tensor, rows: Rows, group: dist.ProcessGroup | None) -> torch.Tensor:
    """This rank's rows ``[S, ...]`` of the sum of all ranks' ``[L, ...]``. Collective, without gradients."""
    if dist.get_world_size(group) == 1:
        return x_L
    dist.all_reduce(x_L, group=group)
    return x_L[rows.positions_S.to(x_L.device)]


class AddUp(torch.autograd.Function):
    """The sum over all ranks, on each of them. Its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


@lru_cache(maxsize=8)  # asked by every layer
def _find_rows(layout: str, documents: tuple[int, ...], world_size: int, rank: int) -> Rows:
    held = [token_positions(spans) for spans in make_layout(layout, documents[-1], world_size, cu_seqlens=documents)]
    num_rows = max(len(each) for each in held)
    places = torch.empty(documents[-1], dtype=torch.int64)
    for index, positions in enumerate(held):
        places[positions] = index * num_rows + torch.arange(len(positions))
    bounds = torch.tensor(documents)
    positions = held[rank]
    document = torch.bucketize(positions, bounds[1:], right=True)
    return Rows(positions, bounds[document], bounds.diff()[document], places, num_rows)
