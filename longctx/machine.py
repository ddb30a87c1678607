"""The machine that a plan is made for, as users describe it. No torch here."""

from dataclasses import dataclass

from parallel.option import option, parse_size


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """What the processes run on, where it is not this machine."""

    memory: str | None = option(
        None, "of one process, as 80GiB; null: its GPU's, or this machine's over the processes on it", parse=parse_size
    )
    num_nodes: int = option(1, "nodes that the processes are spread over in order", minimum=1)
    peak_flops: float | None = option(
        None, "FLOP/s of matrix products of one process; null: measured here, or logger.peak_flops", above=0
    )
    bytes_per_s: float | None = option(
        None, "bytes a second that one process reads and writes; null: measured here", above=0
    )
