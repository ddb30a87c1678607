"""The loop that lets pools grow and shrink: it asks the endpoint what there is to do, and starts and drains workers.

Whoever owns a deployment's workers runs it, ``longctx serve`` or the replica of a RayService: so it ends with them, and
a router that is started again finds it. It keeps nothing that cannot be found out again, and a round that fails changes
nothing. A worker that cannot be placed stays a demand of the Ray cluster, from which Ray's own autoscaler learns that
nodes are missing, until ``cluster.autoscale.place_timeout_s``.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.autoscale.decision import Change, PoolLoad, PoolMemory, decide
from cluster.autoscale.load import is_leaving, measure_pool
from cluster.config import ROLES, ServeConfig
from cluster.handle import WorkerHandle
from cluster.messages import Observation, ScalingReport
from cluster.serving import PoolStatus, StartStatus, WorkerStats
from longctx.errors import LongctxError

logger = logging.getLogger(__name__)

DRAIN_POLL_S = 0.25
Exchange = Callable[[ScalingReport], Awaitable[Observation]]


class Fleet(Protocol):
    """Where workers come from, and go to."""

    async def create(self, role: str) -> WorkerHandle:
        """One more worker; it has loaded nothing, and may have no place yet."""
        ...

    async def place(self, worker: WorkerHandle) -> None:
        """Wait until there is room for its processes, and they run."""
        ...

    async def find(self, name: str, role: str) -> WorkerHandle:
        """A worker that there is."""
        ...

    async def end(self, worker: WorkerHandle) -> None:
        """End its processes for good, and give its room back."""
        ...


@dataclass(slots=True, eq=False)
class _Start:
    """A worker on its way."""

    role: str
    began: float
    worker: WorkerHandle | None = None
    stage: str = "placing"
    is_used: asyncio.Event = field(default_factory=asyncio.Event)  # the router has it

    @property
    def name(self) -> str:
        return self.worker.name if self.worker is not None else ""


@dataclass(slots=True, eq=False)
class _Drain:
    """A worker that is to go."""

    worker: WorkerHandle
    is_known: asyncio.Event = field(default_factory=asyncio.Event)  # the router gives it nothing more
    is_undone: bool = False
    is_ending: bool = False
    task: asyncio.Task[None] | None = None


class Autoscaler:
    """One deployment's.

    Args:
        config: the deployment's.
        fleet: starts and ends workers.
        exchange: tells the endpoint what happens, and says what it sees. May raise anything while there is none.
        clock: seconds that only grow.
    """

    def __init__(
        self, config: ServeConfig, fleet: Fleet, exchange: Exchange, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._scaling = config, config.cluster.autoscale
        self._fleet, self._exchange, self._clock = fleet, exchange, clock
        self._roles = [role for role in ROLES if config.cluster.count_workers(role)]
        self._memory: dict[str, PoolMemory] = {}
        self._loads: dict[str, PoolLoad] = {}
        self._targets: dict[str, int] = {}  # workers by role
        self._starts: list[_Start] = []
        self._drains: dict[str, _Drain] = {}
        self._lost_since: dict[str, float] = {}
        self._counts: Counter[tuple[str, str]] = Counter()  # by role: started, failed, grown, shrunk
        self._decisions: dict[str, tuple[str, str, float]] = {}  # by role: what, why, and when
        self._is_silent = False  # the endpoint is
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Look again and again, until cancelled. Workers on their way are left to their owner."""
        try:
            while True:
                await asyncio.sleep(self._scaling.interval_s)
                try:
                    await self.look()
                except Exception:
                    logger.exception("pools stay as they are: this look failed")
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def look(self) -> None:
        """One round."""
        try:
            observation = await self._exchange(self.report())
        except Exception as error:  # noqa: BLE001 - a router that is being started again; what there is stays
            if not self._is_silent:
                logger.warning(
                    "pools stay as they are: the endpoint does not answer (%s)", str(error) or type(error).__name__
                )
            self._is_silent = True
            return
        self._is_silent = False
        self._note(observation.workers)
        await self._give_up_lost(observation.workers)
        self._loads = {role: self._measure(observation, role) for role in self._roles}
        changes, self._memory = decide(self._loads, self._scaling, self._memory, now=self._clock())
        self._targets = {role: load.num_workers for role, load in self._loads.items()}
        for change in changes:
            self._targets[change.role] += change.num_workers
            await self._apply(change, observation.workers)

    def report(self) -> ScalingReport:
        """What the endpoint is to know."""
        return ScalingReport(
            tuple(map(self._describe, self._roles)),
            self._scaling.window_s,
            self._scaling.percentile,
            self._config.cluster.local_prefill_tokens,
        )

    def _describe(self, role: str) -> PoolStatus:
        pool, now = self._scaling.pool_of(role), self._clock()
        what, why, when = self._decisions.get(role, ("", "", None))
        retry_at = self._memory.get(role, PoolMemory()).retry_at
        return PoolStatus(
            role,
            min_workers=pool.min_workers,
            max_workers=pool.max_workers,
            target_workers=self._targets.get(role),
            starts=tuple(
                StartStatus(start.name, start.stage, now - start.began) for start in self._starts if start.role == role
            ),
            decision=what,
            reason=why,
            decided_at=when,
            num_grown=self._counts[role, "grown"],
            num_shrunk=self._counts[role, "shrunk"],
            num_failed=self._counts[role, "failed"],
            retry_s=max(0.0, retry_at - now),
        )

    def _measure(self, observation: Observation, role: str) -> PoolLoad:
        starts = [start for start in self._starts if start.role == role]
        undone = [drain.worker.name for drain in self._drains.values() if drain.is_undone and drain.worker.role == role]
        return measure_pool(
            observation,
            self._config,
            role,
            starting=[start.name for start in starts if start.name] + undone,
            num_unnamed=sum(not start.name for start in starts),
            draining=[drain.worker.name for drain in self._drains.values() if not drain.is_undone],
            num_started=self._counts[role, "started"],
            num_failed=self._counts[role, "failed"],
        )

    def _note(self, workers: tuple[WorkerStats, ...]) -> None:
        """What the router has noticed of what was begun."""
        known = {worker.name: worker for worker in workers}
        for start in self._starts:
            if start.name in known and known[start.name].alive:
                start.is_used.set()
        for name, drain in list(self._drains.items()):
            if name not in known or known[name].draining or not known[name].alive:
                drain.is_known.set()
            if drain.is_undone and not (name in known and known[name].draining):
                del self._drains[name]

    async def _give_up_lost(self, workers: tuple[WorkerStats, ...]) -> None:
        """A lost worker that Ray does not bring back, for want of a node, makes room for another."""
        starting = {start.name for start in self._starts}
        gone = [
            each for each in workers if not (each.alive or each.name in starting or is_leaving(each, (), self._drains))
        ]
        self._lost_since = {each.name: self._lost_since.get(each.name, self._clock()) for each in gone}
        for worker in gone:
            if self._clock() - self._lost_since[worker.name] > self._scaling.place_timeout_s:
                logger.warning(
                    "%s has not come back in %g s: it is given up", worker.name, self._scaling.place_timeout_s
                )
                drain = _Drain(await self._fleet.find(worker.name, worker.role), is_ending=True)
                self._drains[worker.name] = drain
                self._spawn(self._end(drain))

    async def _apply(self, change: Change, workers: tuple[WorkerStats, ...]) -> None:
        role, num_before = change.role, self._loads[change.role].num_workers
        what = f"from {num_before} to {num_before + change.num_workers} workers"
        logger.info("%s pool: %s (%s)", role, what, change.reason)
        self._decisions[role] = (what, change.reason, time.time())
        if change.num_workers > 0:
            self._counts[role, "grown"] += 1
            num_taken_back = await self._undo_drains(role, change.num_workers)
            for _ in range(change.num_workers - num_taken_back):
                start = _Start(role, self._clock())
                self._starts.append(start)
                self._spawn(self._run_start(start))
            return
        self._counts[role, "shrunk"] += 1
        starting = [start.name for start in self._starts]
        live = [each for each in workers if each.role == role and each.alive and each.name not in starting]
        idlest = min((each for each in live if not is_leaving(each, (), self._drains)), key=_busyness)
        drain = self._drains[idlest.name] = _Drain(await self._fleet.find(idlest.name, role))
        drain.task = self._spawn(self._run_drain(drain))

    # Starting

    async def _run_start(self, start: _Start) -> None:
        try:
            await self._start(start)
            self._counts[start.role, "started"] += 1
            logger.info("%s was started in %.1f s", start.name, self._clock() - start.began)
        except Exception as error:  # noqa: BLE001 - whatever it is, there is no worker: said, and tried again later
            self._counts[start.role, "failed"] += 1
            name = start.name or f"another {start.role} worker"
            logger.warning("%s is given up: %s", name, str(error) or type(error).__name__)
            if start.worker is not None:
                await self._fleet.end(start.worker)
        finally:
            self._starts.remove(start)

    async def _start(self, start: _Start) -> None:
        cluster, place_s = self._config.cluster, self._scaling.place_timeout_s
        async with _limit(place_s, "it found no room in the Ray cluster", "cluster.autoscale.place_timeout_s"):
            start.worker = await self._fleet.create(start.role)
            await self._fleet.place(start.worker)
        start.stage = "loading"
        load_s = cluster.start_timeout_s
        async with _limit(load_s, "it did not load the model", "cluster.start_timeout_s"):
            await start.worker.call("start")
            await start.is_used.wait()

    # Draining

    async def _run_drain(self, drain: _Drain) -> None:
        worker = drain.worker
        try:
            await worker.call("drain", True)
            await drain.is_known.wait()
            while await worker.call("count_requests"):
                await asyncio.sleep(DRAIN_POLL_S)
        except LongctxError as error:  # it is lost, and was to go anyway: its requests go on elsewhere
            logger.warning("%s ends: %s", worker.name, error)
        drain.is_ending = True
        await self._end(drain)
        logger.info("%s had nothing left, and has ended", worker.name)

    async def _end(self, drain: _Drain) -> None:
        try:
            await self._fleet.end(drain.worker)
        finally:
            del self._drains[drain.worker.name]

    async def _undo_drains(self, role: str, num_wanted: int) -> int:
        """Workers that were about to go are there sooner than new ones; returns how many stay."""
        leaving = [each for each in self._drains.values() if each.worker.role == role]
        chosen = [each for each in leaving if not (each.is_ending or each.is_undone)][:num_wanted]
        num_taken_back = 0
        for drain in chosen:
            if drain.task is not None:
                drain.task.cancel()
            try:
                await drain.worker.call("drain", False)
            except LongctxError as error:
                logger.warning("%s does not stay: %s", drain.worker.name, error)
                drain.task = self._spawn(self._run_drain(drain))
                continue
            drain.is_undone = True
            num_taken_back += 1
            logger.info("%s takes requests again", drain.worker.name)
        return num_taken_back

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _busyness(worker: WorkerStats) -> tuple[int, int]:
    """Of workers with equally much to do, the one that came last is the least busy."""
    return worker.engine.num_running + worker.engine.num_waiting, -int(worker.name.rpartition("-")[2])


@asynccontextmanager
async def _limit(timeout_s: float, failure: str, key: str) -> AsyncIterator[None]:
    """As ``asyncio.timeout``; says what did not happen, and which key allows more time."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise LongctxError(f"{failure} in {timeout_s:g} s ({key})") from None
