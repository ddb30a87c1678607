"""The ranks of a training run: one process group of all, and one for each sequence that ranks share.

global_rank = dp_rank * sp_degree + sp_rank
"""

import datetime
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from longctx.training.config import ParallelConfig


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where a rank is on each axis."""

    dp_rank: int
    sp_rank: int


def locate(global_rank: int, sp_degree: int) -> Coordinates:
    """A rank's coordinates."""
    return Coordinates(*divmod(global_rank, sp_degree))


def sp_ranks(dp_rank: int, sp_degree: int) -> list[int]:
    """Global ranks that share the sequences of ``dp_rank``."""
    return list(range(dp_rank * sp_degree, (dp_rank + 1) * sp_degree))


class TrainingWorld:
    """Made and closed by one object; the default group is this process's own.

    Args:
        global_rank: of this process.
        parallel: the axes.
        address, port: of rank 0.
        device: whose tensors travel.
    """

    def __init__(
        self, global_rank: int, parallel: ParallelConfig, *, address: str, port: int, device: torch.device
    ) -> None:
        self.rank, self.world_size = global_rank, parallel.dp_degree * parallel.sp_degree
        self.at = locate(global_rank, parallel.sp_degree)
        self.device = device
        timeout = datetime.timedelta(seconds=parallel.timeout_s)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{address}:{port}",
            rank=global_rank,
            world_size=self.world_size,
            timeout=timeout,
        )
        groups = [
            dist.new_group(sp_ranks(dp_rank, parallel.sp_degree), timeout=timeout)
            for dp_rank in range(parallel.dp_degree)
        ]
        self.sp_group: Any = groups[self.at.dp_rank]  # what torch's stubs say of it is not what it is

    def add_up(self, numbers: list[float]) -> list[float]:
        """Sums over all ranks, in float64. Collective."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def largest(self, numbers: list[float]) -> list[float]:
        """Greatest over all ranks. Collective."""
        return self._reduce(numbers, dist.ReduceOp.MAX)

    def close(self) -> None:
        """End the groups."""
        dist.destroy_process_group()

    def _reduce(self, numbers: list[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, op=operation)
        return tensor.tolist()
