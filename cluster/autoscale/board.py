"""Where the endpoint and the autoscaler meet: what the one knows of the load, and what the other made of it."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from cluster.autoscale.latency_window import LatencyWindow
from cluster.config import ROLES
from cluster.messages import Observation, ScalingReport
from cluster.serving import PoolStatus, ServingBackend, WorkerStats


class PoolBoard:
    """One endpoint's.

    Args:
        backend: who generates.
        window: what requests experienced.
    """

    def __init__(self, backend: ServingBackend, window: LatencyWindow) -> None:
        self._backend, self._window = backend, window
        self._pools: dict[str, PoolStatus] = {}
        self._told_at: float | None = None
        self.loop: asyncio.AbstractEventLoop | None = None  # the backend's, once it has started

    async def exchange(self, report: ScalingReport) -> Observation:
        """Take in what the autoscaler says, and tell it what there is."""
        self._pools = {pool.role: pool for pool in report.pools}
        self._told_at = time.monotonic()
        window, long = self._window, report.long_tokens
        return Observation(
            tuple(await self._backend.worker_stats()),
            self._backend.queue(),
            window.find_ttft(report.percentile, report.window_s, at_most=long),
            window.find_ttft(report.percentile, report.window_s, above=long),
            window.find_tpot(report.percentile, report.window_s),
        )

    @property
    def silence_s(self) -> float | None:
        """Seconds since the autoscaler was last heard of; None if it never was."""
        return None if self._told_at is None else time.monotonic() - self._told_at

    def describe(self, workers: Sequence[WorkerStats]) -> list[PoolStatus]:
        """Every pool that has, or may get, a worker: who is there now, and what the autoscaler last said."""
        return [
            replace(self._pools.get(role, PoolStatus(role)), **count_workers(workers, role))
            for role in ROLES
            if role in self._pools or any(worker.role == role for worker in workers)
        ]


def count_workers(workers: Sequence[WorkerStats], role: str) -> dict[str, int]:
    """How many of a role are there, come and go; one that is lost is expected back."""
    mine = [worker for worker in workers if worker.role == role]
    num_draining = sum(worker.draining for worker in mine)
    num_live = sum(worker.alive and not worker.draining for worker in mine)
    return {
        "num_live": num_live,
        "num_starting": len(mine) - num_live - num_draining,
        "num_draining": num_draining,
    }
