"""Workers as actors of a Ray cluster, for the autoscaler; they belong to the process that runs it, and end with it."""

import asyncio
import logging
import threading
from contextlib import suppress

from cluster.actors import ActorGroup, kill_worker
from cluster.autoscale.autoscaler import Autoscaler, Exchange
from cluster.config import ServeConfig
from cluster.handle import WorkerHandle
from cluster.ray_handle import RayHandle, find_worker
from cluster.worker_actors import create_another

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 15.0


class RayFleet:
    """See ``cluster.autoscale.autoscaler.Fleet``; the same path as ``longctx worker add`` and ``drain``.

    Args:
        config: the deployment's.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._groups: dict[str, ActorGroup] = {}  # an actor ends when nobody refers to it
        self._unplaced: set[str] = set()  # of these, no process runs yet
        self._naming = asyncio.Lock()

    async def create(self, role: str) -> WorkerHandle:
        async with self._naming:
            group = await asyncio.to_thread(create_another, self._config, role, waits=False)
            self._groups[group.handle.name] = group
            self._unplaced.add(group.handle.name)
        return group.handle

    async def place(self, worker: WorkerHandle) -> None:
        await worker.call("__ray_ready__")
        self._unplaced.discard(worker.name)

    async def find(self, name: str, role: str) -> WorkerHandle:
        return await asyncio.to_thread(find_worker, name, role, self._config.ray.namespace)

    async def end(self, worker: WorkerHandle) -> None:
        assert isinstance(worker, RayHandle)
        if worker.name not in self._unplaced:
            with suppress(Exception):  # it may be lost: it ends all the same
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await worker.call("close")
        self._unplaced.discard(worker.name)
        await asyncio.to_thread(kill_worker, worker, self._config.ray.namespace)
        group = self._groups.pop(worker.name, None)
        if group is not None:
            await asyncio.to_thread(group.kill)


class AutoscalerThread:
    """The autoscaler of a deployment, on a thread of the process that owns the workers.

    Args:
        config: the deployment's.
        exchange: see ``Autoscaler``.
    """

    def __init__(self, config: ServeConfig, exchange: Exchange) -> None:
        self._fleet = RayFleet(config)  # outlives the loop: its workers end with the last reference to them
        self._autoscaler = Autoscaler(config, self._fleet, exchange)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="autoscaler", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_up = threading.Event()

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()
        self._is_up.wait()

    def stop(self, timeout_s: float) -> None:
        """No worker comes or goes any more through it once this has returned. Idempotent."""
        loop, task = self._loop, self._task
        if loop is not None and task is not None:
            with suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(task.cancel)
            self._thread.join(timeout_s)

    async def _run(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._is_up.set()
        with suppress(asyncio.CancelledError):
            await self._autoscaler.run()
