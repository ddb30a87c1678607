"""Where in the protocol a worker's process may be hit, and what hits it there; installed in it before it starts.

A partition cuts the process off from the router and from other workers' KV without a word: nothing that it writes
arrives, and nothing that is written to it, until it heals; connections stay open.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.decode_side import DecodeSide
from cluster.messages import WorkerReport
from cluster.prefill_side import PrefillSide, StreamExport
from cluster.worker import Worker
from memory.frames import FrameSocket
from memory.leases import LeaseTable

FAULTS = ("kill", "freeze", "partition")
# Role and point: what is called there, whether it is hit before or after, and at which call.
POINTS: dict[tuple[str, str], tuple[type, str, str, int]] = {
    ("prefill", "asked"): (PrefillSide, "_add", "before", 1),
    ("prefill", "queued"): (PrefillSide, "_add", "after", 1),
    ("prefill", "first layer"): (StreamExport, "on_layer", "after", 1),
    ("prefill", "middle"): (StreamExport, "on_layer", "after", 7),
    ("prefill", "before commit"): (StreamExport, "on_prefilled", "before", 1),
    ("prefill", "after commit"): (StreamExport, "on_prefilled", "after", 1),
    ("prefill", "acknowledged"): (PrefillSide, "_end", "before", 1),
    ("prefill", "done"): (PrefillSide, "_end", "after", 1),
    ("decode", "asked"): (DecodeSide, "_reserve", "before", 1),
    ("decode", "reserved"): (DecodeSide, "_reserve", "after", 1),
    ("decode", "first block"): (LeaseTable, "count", "after", 1),
    ("decode", "middle"): (LeaseTable, "count", "after", 7),
    ("decode", "before commit"): (LeaseTable, "commit", "before", 1),
    ("decode", "committed"): (DecodeSide, "_arrive", "before", 1),
    ("decode", "attached"): (DecodeSide, "_arrive", "after", 1),
    ("decode", "decoding"): (Worker, "post", "after", 30),
}


@dataclass(frozen=True, slots=True)
class FaultOrder:
    """What is to happen to one process, once."""

    role: str
    point: str
    fault: str
    seconds: float  # until a freeze is thawed by whoever ordered it, or a partition heals
    mark: str  # file that appears at the moment of the fault


class Partition:
    """Whether this process is cut off."""

    def __init__(self) -> None:
        self.until_s = 0.0

    @property
    def is_cut(self) -> bool:
        """Whether it is now."""
        return time.monotonic() < self.until_s

    async def wait_until_healed(self) -> None:
        """Return once it is not."""
        while self.is_cut:
            await asyncio.sleep(0.02)


def install(order: FaultOrder, partition: Partition) -> None:
    """Let the fault happen when its point is reached."""
    owner, name, moment, number = POINTS[order.role, order.point]
    original, count, lock = getattr(owner, name), [0], threading.Lock()

    def is_due() -> bool:
        with lock:
            count[0] += 1
            return count[0] == number

    def wrapped(*args, **kwargs):
        due = is_due()
        if due and moment == "before":
            _hit(order, partition)
        result = original(*args, **kwargs)
        if due and moment == "after":
            _hit(order, partition)
        return result

    setattr(owner, name, wrapped)
    if order.fault == "partition":
        _cut_links(partition)


def _hit(order: FaultOrder, partition: Partition) -> None:
    Path(order.mark).touch()
    if order.fault == "partition":
        partition.until_s = time.monotonic() + order.seconds
    else:
        os.kill(os.getpid(), signal.SIGKILL if order.fault == "kill" else signal.SIGSTOP)


def _cut_links(partition: Partition) -> None:
    """KV links and reports neither take nor give anything while the process is cut off."""
    poll = Worker.poll

    async def cut_poll(self: Worker, max_wait_s: float, session: str) -> WorkerReport:
        report = await poll(self, max_wait_s, session)
        await partition.wait_until_healed()
        return report

    Worker.poll = cut_poll  # type: ignore[method-assign]
    wait, receive = FrameSocket.wait, FrameSocket.receive_some
    send: Callable[..., None] = FrameSocket.send

    def cut_wait(self: FrameSocket, events: int, deadline: float) -> int:
        if not partition.is_cut:
            return wait(self, events, deadline)
        time.sleep(0.02)  # as if woken: whoever waits looks at the clock, and waits again
        return 0

    def cut_receive(self: FrameSocket, cursor: object) -> int:
        return 0 if partition.is_cut else receive(self, cursor)  # type: ignore[arg-type]

    def cut_send(self: FrameSocket, buffers: object, deadline: float, **options: object) -> None:
        while partition.is_cut:
            if time.monotonic() >= deadline:
                raise TimeoutError("the peer took no data in time")
            time.sleep(0.02)
        send(self, buffers, deadline, **options)

    FrameSocket.wait, FrameSocket.receive_some, FrameSocket.send = cut_wait, cut_receive, cut_send  # type: ignore[method-assign]
