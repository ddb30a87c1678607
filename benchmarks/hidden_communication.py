"""How much of a plan's communication is hidden, of what computing could hide: the plan runs with and without each.

both            T: as it is
compute         C: every message is there at once
communication   M: every tile is done at once
executor        O: both at once; what is left is part of all four

hidden = (C + M - O - T) / (min(C, M) - O): 1 where T is the longer of the two, 0 where one follows the other
"""

from collections.abc import Sequence
from itertools import product
from statistics import median
from typing import Any

import torch

from benchmarks.rank_clock import Stopwatch
from parallel.carrier import Carrier, Message, Transfer, drive, open_carrier
from parallel.plan import Plan
from parallel.tile_attention import Block, TileKernel, choose_kernel
from parallel.tile_exchange import Backward, Forward

MODES = ("both", "compute", "communication", "executor")
DIRECTIONS = ("forward", "backward")
LEAST_SHARE = 0.1  # of T: what could be hidden must be as much for its share to say anything


class InstantCarrier(Carrier):
    """Whatever is to be received is there at once, and zero."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Transfer], list[Transfer]]:
        for message in receives:
            message.buffer.zero_()
        return [_Done(message, "send to") for message in sends], [
            _Done(message, "receive from") for message in receives
        ]

    def gather_numbers(self, numbers: Sequence[int], timeout_s: float) -> list[list[int]]:
        raise NotImplementedError("nobody else is there")


class _Done(Transfer):
    def __init__(self, message: Message, verb: str) -> None:
        self.peer, self.verb = message.peer, verb

    def is_done(self) -> bool:
        return True

    def wait(self, timeout_s: float) -> None:
        """Nothing to wait for."""


class InstantKernel(TileKernel):
    """Every tile is zero."""

    def forward(
        self, q_BSHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, block: Block, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(q_BSHD), q_BSHD.new_zeros(q_BSHD.shape[:3])

    def backward(
        self,
        dout_BSHD: torch.Tensor,
        q_BSHD: torch.Tensor,
        k_BLKD: torch.Tensor,
        v_BLKD: torch.Tensor,
        lse_BSH: torch.Tensor,
        delta_BSH: torch.Tensor,
        block: Block,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.zeros_like(q_BSHD), torch.zeros_like(k_BLKD), torch.zeros_like(v_BLKD)


class HiddenCommunication:
    """One rank's side of the measurement of one plan.

    Args:
        plan: what runs.
        tensors: this rank's q, k, v and the gradient of its output.
        timeout_s: for any message.
    """

    def __init__(self, plan: Plan, tensors: Sequence[torch.Tensor], timeout_s: float) -> None:
        self.plan, self._timeout_s = plan, timeout_s
        self._q, self._k, self._v, self._dout = (tensor.detach() for tensor in tensors)
        self._carrier = open_carrier(None, self._q.device)
        self._instant_carrier = InstantCarrier(self._carrier.rank, self._carrier.world_size)
        self._kernel, self._instant_kernel = (
            choose_kernel(self._q.device, self._q.dtype, self._q.shape[3]),
            InstantKernel(),
        )
        self.record: dict[str, Any] = {"plan": plan.name} | {
            direction: {f"{mode}_{what}": [] for mode, what in product(MODES, ("s", "cpu_s"))}
            for direction in DIRECTIONS
        }

    def run(self) -> None:
        """Every mode once, forward and backward."""
        for mode in MODES:
            carrier = self._carrier if mode in ("both", "communication") else self._instant_carrier
            kernel = self._kernel if mode in ("both", "compute") else self._instant_kernel
            self._run(mode, carrier, kernel)

    def _run(self, mode: str, carrier: Carrier, kernel: TileKernel) -> None:
        rank, scale = carrier.rank, self._q.shape[-1] ** -0.5
        watch = Stopwatch()
        forward = Forward(self.plan, rank, carrier, kernel, self._q, self._k, self._v, scale)
        drive(forward.run(), rank, self._timeout_s)
        self._note("forward", mode, watch)
        delta = (self._dout * forward.out).sum(-1)
        tensors = self._q, self._k, self._v, self._dout, forward.lse, delta
        watch = Stopwatch()
        backward = Backward(self.plan, rank, carrier, kernel, *tensors, scale, forward.kept)
        drive(backward.run(), rank, self._timeout_s)
        self._note("backward", mode, watch)

    def _note(self, direction: str, mode: str, watch: Stopwatch) -> None:
        lap = watch.stop()
        self.record[direction][f"{mode}_s"].append(lap.seconds)
        self.record[direction][f"{mode}_cpu_s"].append(lap.cpu_s)


def describe_hidden(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks recorded of one plan: medians, the shares, and the CPU time that communication takes."""
    result: dict[str, Any] = {"plan": ranks[0]["plan"]}
    sums = {"hidden_s": 0.0, "hideable_s": 0.0, "both_s": 0.0}
    for direction in DIRECTIONS:
        times = {f"{mode}_s": median(ranks[0][direction][f"{mode}_s"]) for mode in MODES}
        cpu = {
            mode: sum(median(rank[direction][f"{mode}_cpu_s"]) for rank in ranks)
            for mode in ("communication", "executor")
        }
        both, compute, communication, executor = times.values()
        hidden, hideable = compute + communication - executor - both, min(compute, communication) - executor
        result[direction] = times | {
            "communication_cpu_s": cpu["communication"] - cpu["executor"],
            "hidden": share_hidden(hidden, hideable, both),
        }
        sums = {"hidden_s": sums["hidden_s"] + hidden, "hideable_s": sums["hideable_s"] + hideable} | {
            "both_s": sums["both_s"] + both
        }
    return result | {"hidden": share_hidden(sums["hidden_s"], sums["hideable_s"], sums["both_s"])}


def share_hidden(hidden_s: float, hideable_s: float, both_s: float) -> float | None:
    """0 to 1; None where too little could be hidden."""
    if hideable_s < LEAST_SHARE * both_s:
        return None
    return round(min(1.0, max(0.0, hidden_s / hideable_s)), 3)
