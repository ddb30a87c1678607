"""An engine on its own thread, and an outbox that the router polls; ``cluster/serving_worker.py`` says what it does.

Plain classes; ``cluster/actors.py`` makes Ray actors of them. Their coroutines run on one event loop, apart from the
engine's thread: the worker answers while a long step computes.
"""

import asyncio
import contextlib
import logging
import os
import socket
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from cluster.config import ServeConfig
from cluster.handle import LocalHandle, WorkerHandle
from cluster.messages import LineAddress, WorkerInfo, WorkerReport
from cluster.rank_peers import RankPeers
from cluster.serving import WorkerStats
from cluster.worker_line import LineServer
from longctx.engine.build import MakePool, build_engine
from longctx.engine.engine import Engine
from longctx.engine.loop import EngineLoop
from longctx.errors import LongctxError, WorkerLostError
from longctx.messages import OutputDelta
from longctx.shards.group import ShardGroup
from longctx.shards.plans import PlanChoice
from memory.node_address import node_address
from memory.tls import make_context
from parallel.gloo_group import GlooGroup

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
STATS_INTERVAL_S = 0.25


class Worker(ABC):
    """One engine behind coroutines.

    Args:
        name: unique in the deployment.
        role: which of the configuration's groups says what it is like.
        config: of the deployment.
        node_id: of the machine; workers with equal ones share /dev/shm.
        ranks: the other ranks that share its sequences; this is rank 0.
        on_lost: called once one of them is lost, or the engine fails, with the reason; from any thread.
    """

    def __init__(
        self,
        name: str,
        role: str,
        config: ServeConfig,
        *,
        node_id: str = "",
        ranks: Sequence[WorkerHandle] = (),
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self.name, self.role = name, role
        self.config = config
        self.node_id = node_id or socket.gethostname()
        self.incarnation = uuid.uuid4().hex
        self._engine: Engine | None = None
        self._engine_loop: EngineLoop | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news = asyncio.Event()
        self._deltas: deque[OutputDelta] = deque()
        self._tasks: set[asyncio.Task[None]] = set()  # referenced while they run
        self._finished: deque[tuple[str, str]] = deque()
        self._starting = asyncio.Lock()
        self._is_closed = False
        self.ranks = RankPeers(ranks, config.cluster)
        self._on_lost = on_lost
        self._is_draining = False
        self.deployment = ""  # digest of the configuration that it was made with
        self._session = ""  # the router's, which alone is told what is new
        self._line: LineServer | None = None
        self._lost = ""  # a rank or the engine, and why: nothing works any more
        self._stats: WorkerStats | None = None
        self._stats_due = 0.0

    # For the router

    async def start(self) -> WorkerInfo:
        """Load the model, once; says what the worker is. Raises ``CheckpointError`` or ``ConfigError``."""
        async with self._starting:
            self._check_open()
            if self._engine_loop is None:
                self._loop = asyncio.get_running_loop()
                self._engine = await self._start_engine()
                try:
                    self._open()
                except BaseException:
                    self._engine = None
                    raise
                self._engine_loop = EngineLoop(self._engine, self.post, name=self.name, on_broken=self._lose)
        return self.info()

    def info(self) -> WorkerInfo:
        """What the worker is."""
        return WorkerInfo(
            self.name,
            self.role,
            self.incarnation,
            socket.gethostname(),
            self.node_id,
            os.getpid(),
            self.engine.max_context,
            self.ranks.sp_degree,
            self.deployment,
        )

    async def poll(self, max_wait_s: float, session: str) -> WorkerReport:
        """What is new; waits up to ``max_wait_s`` seconds for something. One caller at a time.

        Raises ``LongctxError`` if a router has begun another session meanwhile: what is new is for that one. A poll
        outlives a router that was killed, and would take a token with it.
        """
        self._check_open(session)
        if not self._news.is_set():
            with contextlib.suppress(TimeoutError):  # the answer is itself a sign of life
                async with asyncio.timeout(max_wait_s):
                    await self._news.wait()
        self._check_open(session)
        self._news.clear()
        deltas, finished = _drain(self._deltas), _drain(self._finished)
        return WorkerReport(self.incarnation, deltas, finished, self._take_stats(), self._is_draining)

    async def listen(self, session: str) -> LineAddress:
        """Where the router can connect, once, for reports and calls. Raises ``OSError``."""
        self._check_open(session)
        if self._line is None:
            transport = self.config.transport
            context = make_context(transport, server_side=True)
            next_report = partial(self.poll, self.config.cluster.heartbeat_s)
            call = LocalHandle(self).call
            self._line = LineServer(transport.host or node_address(), context, next_report=next_report, call=call)
        return await self._line.open(session)

    async def drain(self, is_draining: bool = True) -> None:
        """Take nothing new from now on, or again; what is here goes on."""
        self._is_draining = is_draining
        self._announce()

    async def count_requests(self) -> int:
        """Requests, reservations and exports that are here."""
        return await self.on_engine(lambda: self.engine.num_requests)

    async def cancel(self, request_id: str) -> None:
        """End a request wherever it stands; an unknown one is no error."""
        await self.on_engine(self._cancel, request_id)

    async def reset(self, session: str) -> None:
        """End everything: a router begins a session, whose name its polls give."""
        self._session = session
        await self.on_engine(self._reset)
        self._deltas.clear()
        self._finished.clear()

    async def close(self) -> None:
        """Stop the engine and give everything back. Idempotent."""
        self._is_closed = True
        if self._line is not None:
            self._line.close()
        await self.ranks.unfollow()
        engine_loop, self._engine_loop = self._engine_loop, None
        if engine_loop is not None:
            try:
                await asyncio.to_thread(engine_loop.close, CLOSE_TIMEOUT_S)
            except TimeoutError as error:
                logger.warning("%s: %s", self.name, error)
            await asyncio.to_thread(self._shut)
        if self.ranks:
            await self.ranks.close()

    # For the parts of a worker

    @property
    def engine(self) -> Engine:
        """The engine; ``WorkerLostError`` before ``start``."""
        if self._engine is None:
            raise WorkerLostError(f"{self.name} has not started")
        return self._engine

    async def on_engine(self, function, /, *args):  # noqa: ANN201 - as EngineLoop.call
        """Run ``function`` on the engine's thread between two steps and wait for its result."""
        return await asyncio.wrap_future(self.engine_loop.call(function, *args))

    @property
    def engine_loop(self) -> EngineLoop:
        """The engine's thread; ``WorkerLostError`` before ``start`` (Ray restarted the process), after ``close`` and
        once the worker is lost.
        """
        self._check_open()
        if self._engine_loop is None:
            raise WorkerLostError(f"{self.name} is not running")
        return self._engine_loop

    def post(self, deltas: Iterable[OutputDelta]) -> None:
        """Put deltas into the outbox; from any thread."""
        self._deltas.extend(deltas)
        self._announce()

    def post_finished(self, request_id: str, reason: str = "") -> None:
        """Tell the router that a prefill ended; from any thread."""
        self._finished.append((request_id, reason))
        self._announce()

    def _check_open(self, session: str | None = None) -> None:
        if self._is_closed:
            raise WorkerLostError(f"{self.name} is closed")
        if self._lost:
            raise WorkerLostError(f"{self.name} is lost: {self._lost}")
        if session is not None and session != self._session:
            raise LongctxError(f"another router has begun with {self.name}")

    def _lose(self, reason: str) -> None:
        """A rank of this worker or its engine is lost, and with it the worker; from any thread."""
        if self._lost or self._is_closed:
            return
        self._lost = reason
        logger.error("%s: %s", self.name, reason)
        self._announce()
        if self._on_lost is not None:
            self._on_lost(reason)

    def from_other_thread(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine on the worker's event loop; from any thread."""
        loop = self._loop

        def start(loop: asyncio.AbstractEventLoop) -> None:
            task = loop.create_task(function())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(start, loop)

    async def _start_engine(self) -> Engine:
        build = partial(
            build_engine,
            self.config.model_of(self.role),
            self.config.engine_of(self.role),
            attention=self.config.attention,
            make_pool=self._make_pool(),
            ships=self.config.cluster.num_prefill_workers > 0,
        )
        if not self.ranks:
            return await self._build_engine(build)
        links, cluster = self.ranks.load_links(), self.config.cluster
        choice = PlanChoice(cluster.group_of(self.role).plan, links)

        async def build_sharded(join: Callable[[], GlooGroup]) -> Engine:
            def make() -> Engine:
                return build(shards=ShardGroup(join(), self.node_id, choice, cluster.call_timeout_s))

            return await self._build_engine(make)

        address = self.config.transport.host or node_address()
        engine, incarnations = await self.ranks.start(address, links, build_sharded)
        self.ranks.follow(incarnations, on_arrival=self._take_arrival, on_lost=self._lose)
        return engine

    async def _build_engine(self, build: Callable[[], Engine]) -> Engine:
        """On a thread that ends: libgomp counts helpers of one that lives on, and lets the engine's sleep at once."""
        executor = ThreadPoolExecutor(1)
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, build)
        finally:
            executor.shutdown(wait=False)

    def _announce(self) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._news.set)

    def _take_stats(self) -> WorkerStats | None:
        """The last known state; asks for a new one without waiting: a step may take seconds."""
        now = asyncio.get_running_loop().time()
        if self._engine_loop is not None and now >= self._stats_due:
            self._stats_due = now + STATS_INTERVAL_S
            self._engine_loop.call(self._note_stats)
        stats, self._stats = self._stats, None
        return stats

    def _note_stats(self) -> None:
        stats = WorkerStats(
            self.name,
            self.role,
            self.engine.stats(),
            socket.gethostname(),
            os.getpid(),
            bytes_shipped=self.ranks.bytes_shipped,
            sp_degree=self.ranks.sp_degree,
        )
        self._stats = self._describe_transport(stats)

    @abstractmethod
    def _take_arrival(self, rank: int, request_id: str, payload: bytes | None, reason: str) -> None:
        """A lease on another rank's pages has ended: committed, or failed for a reason."""

    @abstractmethod
    def _make_pool(self) -> MakePool | None:
        """How the page pool is allocated; None: plain memory."""

    @abstractmethod
    def _open(self) -> None:
        """Open the transports, once the engine is there."""

    @abstractmethod
    def _shut(self) -> None:
        """Close the transports; the engine has stopped."""

    @abstractmethod
    def _cancel(self, request_id: str) -> None:
        """On the engine's thread."""

    @abstractmethod
    def _reset(self) -> None:
        """On the engine's thread."""

    @abstractmethod
    def _describe_transport(self, stats: WorkerStats) -> WorkerStats:
        """With the names of the transports, and what was shipped."""


def _drain(queue: deque) -> tuple:
    """Everything in ``queue``; others may append meanwhile."""
    return tuple(queue.popleft() for _ in range(len(queue)))
