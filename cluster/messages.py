"""What the router and the workers say to each other: frozen, slotted dataclasses without I/O. (KV leases:
``memory/messages.py``; requests and deltas: ``longctx/messages.py``.)"""

from dataclasses import dataclass
from typing import Literal

from cluster.serving import WorkerStats
from longctx.messages import OutputDelta
from memory.messages import LeaseGrant


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


@dataclass(frozen=True, slots=True)
class Admission:
    """A decode worker's answer to a request.

    ``leased``: pages are reserved, ``grant`` lets a prefill worker fill them. ``local``: it computes the prompt itself.
    ``full``: no room now.
    """

    kind: Literal["leased", "local", "full"]
    grant: LeaseGrant | None = None


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What happened at a worker since the last report."""

    incarnation: str
    deltas: tuple[OutputDelta, ...]  # decode workers
    finished: tuple[tuple[str, str], ...]  # prefill workers: (request id, reason it failed, or "" if it was taken over)
    stats: WorkerStats | None = None  # now and then
