"""What the router and the workers say to each other: frozen, slotted dataclasses without I/O. (KV leases:
``memory/messages.py``; requests and deltas: ``longctx/messages.py``.)"""

from dataclasses import dataclass, field
from typing import Literal

from cluster.serving import PoolStatus, QueueStats, WorkerStats
from longctx.messages import OutputDelta
from memory.messages import LeaseGrant
from parallel.links import LinkModel


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker is, once it has loaded the model."""

    name: str
    role: str  # "prefill" or "decode"
    incarnation: str  # differs after every restart
    host: str  # name of the machine
    node_id: str  # workers with equal ones share /dev/shm
    pid: int
    max_context: int  # tokens of prompt and output together that fit its pool
    sp_degree: int = 1  # ranks that share its sequences
    deployment: str = ""  # digest of the configuration that it was made with, if it was made for one


@dataclass(frozen=True, slots=True)
class Admission:
    """A decode worker's answer to a request.

    ``leased``: pages are reserved, ``grants`` let a prefill worker fill them, one for each rank of this worker.
    ``local``: it computes the prompt itself. ``full``: no room now.
    """

    kind: Literal["leased", "local", "full"]
    grants: tuple[LeaseGrant, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What happened at a worker since the last report."""

    incarnation: str
    deltas: tuple[OutputDelta, ...]  # decode workers
    finished: tuple[tuple[str, str], ...]  # prefill workers: (request id, reason it failed, or "" if it was taken over)
    stats: WorkerStats | None = None  # now and then
    is_draining: bool = False  # it takes nothing new


@dataclass(frozen=True, slots=True)
class LineAddress:
    """Where a worker listens for its router, and the key that opens one connection (``cluster/worker_line.py``)."""

    host: str
    port: int
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class RankStart:
    """What a rank other than 0 needs to join its worker's group."""

    rank: int
    world_size: int
    meeting: tuple[str, int]  # address and port at rank 0
    links: LinkModel


@dataclass(frozen=True, slots=True)
class RankReport:
    """What happened at a rank other than 0 since the last report."""

    incarnation: str
    arrivals: tuple[tuple[str, bytes | None, str], ...]  # (request id, commit's payload, or None and the reason)
    bytes_shipped: int  # KV bytes sent to other workers since the start


@dataclass(frozen=True, slots=True)
class ScalingReport:
    """What the autoscaler tells the endpoint, and what it asks it."""

    pools: tuple[PoolStatus, ...]
    window_s: float  # seconds that count for latencies
    percentile: float  # of their requests
    long_tokens: int  # prompts with more tokens are long


@dataclass(frozen=True, slots=True)
class Observation:
    """What the endpoint knows of the load. Latencies are None without a request in the window."""

    workers: tuple[WorkerStats, ...]
    queue: QueueStats
    ttft_s: float | None = None  # prompts that are not long
    long_ttft_s: float | None = None
    tpot_s: float | None = None
