"""Times and bytes of one rank among others: all begin together, and what counts is the slowest."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Lap:
    """Of one rank, but for ``seconds``, the slowest rank's."""

    seconds: float
    cpu_s: float  # of all threads of this rank
    sent_bytes: int


class Stopwatch:
    """Started on all ranks together. Collective."""

    def __init__(self) -> None:
        dist.barrier()
        self._sent, self._cpu_s = count_sent(), time.process_time()
        dist.barrier()
        self._begun = time.perf_counter()

    def stop(self) -> Lap:
        """When this rank is done; returns when all are."""
        seconds, cpu_s = time.perf_counter() - self._begun, time.process_time() - self._cpu_s
        dist.barrier()
        sent = count_sent() - self._sent
        return Lap(find_largest(seconds), cpu_s, sent)


def count_sent() -> int:
    """Bytes that this rank's links have sent, as the kernel counts them."""
    files = Path("/sys/class/net").glob("link*/statistics/tx_bytes")
    return sum(int(file.read_text()) for file in files)


def find_largest(value: float) -> float:
    """Of all ranks' values. Collective."""
    number = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()
