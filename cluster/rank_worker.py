"""A rank other than 0 of a worker: computes what rank 0 tells it, and has transports of its own.

Rank 0 alone speaks to the router, and to this through a handle: it starts the rank, opens exports and leases on its
pages, and polls it, which is also the sign of life. A rank that has lost its group is of no more use: its process ends,
and whoever started it starts it anew.
"""

import asyncio
import contextlib
import logging
import socket
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.config import ServeConfig
from cluster.messages import RankReport, RankStart
from cluster.shipping import choose_sending_pool, open_receivers, open_senders, receives, sends
from longctx.engine.build import build_rank
from longctx.errors import WorkerLostError
from longctx.shards.group import ShardGroup
from longctx.shards.plans import PlanChoice
from longctx.shards.runner import Rank, follow_on_thread
from memory.messages import LeaseGrant
from memory.node_address import node_address
from memory.transport import KVReceiver, KVSender
from parallel.gloo_group import GlooGroup

logger = logging.getLogger(__name__)


class RankWorker:
    """One rank behind coroutines.

    Args:
        name: unique in the deployment.
        role: of its worker.
        config: of the deployment.
        node_id: of the machine; ranks with equal ones share its cores.
        on_lost: called once the group is lost, with the reason; from any thread.
    """

    def __init__(
        self,
        name: str,
        role: str,
        config: ServeConfig,
        *,
        node_id: str = "",
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self.name, self.role, self.config = name, role, config
        self.node_id = node_id or socket.gethostname()
        self.incarnation = uuid.uuid4().hex
        self._on_lost = on_lost
        self._is_started = False
        self._lost = ""  # why it is of no more use
        self._rank: Rank | None = None
        self._group: GlooGroup | None = None
        self._senders: dict[str, KVSender] = {}
        self._receivers: dict[str, KVReceiver] = {}
        self._arrivals: deque[tuple[str, bytes | None, str]] = deque()
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self, start: RankStart) -> str:
        """Join the group and load the model, once in this process's life; says which incarnation it is.

        Raises ``WorkerLostError`` if it was started before, and what loading raises.
        """
        if self._is_started:
            self._lose("rank 0 began anew")
            raise WorkerLostError(f"{self.name} is in a group already, and ends now")
        self._is_started = True
        self._loop = asyncio.get_running_loop()
        executor = ThreadPoolExecutor(1)  # see Worker._build_engine
        try:
            await self._loop.run_in_executor(executor, self._join, start)
        finally:
            executor.shutdown(wait=False)
        return self.incarnation

    async def poll(self, max_wait_s: float) -> RankReport:
        """What is new; waits up to ``max_wait_s`` seconds for something."""
        self._check()
        if not self._news.is_set():
            with contextlib.suppress(TimeoutError):  # the answer is itself a sign of life
                async with asyncio.timeout(max_wait_s):
                    await self._news.wait()
        self._check()
        self._news.clear()
        arrivals = tuple(self._arrivals.popleft() for _ in range(len(self._arrivals)))
        return RankReport(self.incarnation, arrivals, sum(sender.bytes_shipped for sender in self._senders.values()))

    async def open_export(self, request_id: str, grants: Sequence[LeaseGrant]) -> None:
        """From now on this rank's pages of a prompt are sent to the holders of ``grants``."""
        rank = self._check()

        def ignore(_: str = "") -> None:
            """Rank 0's own streams on the same leases are told the same."""

        sinks = [self._senders[grant.transport].open(grant, on_acked=ignore, on_failed=ignore) for grant in grants]
        rank.exports.open(request_id, sinks)

    async def close_export(self, request_id: str, reason: str) -> None:
        """Nothing more of the prompt is sent; an unknown request is no error."""
        self._check().exports.close(request_id, reason)

    async def grant(
        self,
        transport: str,
        request_id: str,
        pages: Sequence[int],
        page_idxs: Sequence[int],
        num_tokens: int,
        num_senders: int,
    ) -> LeaseGrant:
        """A lease on some of this rank's pages; how it ends is in a later report."""
        self._check()
        return self._receivers[transport].grant(
            request_id, pages, page_idxs=page_idxs, num_tokens=num_tokens, num_senders=num_senders
        )

    async def revoke(self, request_id: str) -> None:
        """Take a lease back: nothing will write its pages once this has returned."""
        for receiver in self._receivers.values():
            receiver.revoke(request_id)

    async def close(self) -> None:
        """Give everything back; rank 0 has let the group go."""
        self._lost = self._lost or f"{self.name} is closed"
        await asyncio.to_thread(self._shut)

    def _join(self, start: RankStart) -> None:
        cluster, transport = self.config.cluster, self.config.transport
        address = transport.host or node_address()
        timeout_s = cluster.start_timeout_s
        group = GlooGroup(start.rank, start.world_size, meeting=start.meeting, address=address, timeout_s=timeout_s)
        plan = cluster.group_of(self.role).plan
        shards = ShardGroup(group, self.node_id, PlanChoice(plan, start.links), cluster.call_timeout_s)
        make_pool = choose_sending_pool(transport) if sends(cluster, self.role) else None
        rank = build_rank(
            self.config.model_of(self.role),
            self.config.engine_of(self.role),
            shards,
            attention=self.config.attention,
            make_pool=make_pool,
        )
        if sends(cluster, self.role):
            self._senders = open_senders(rank.pool, transport)
        if receives(cluster, self.role):
            self._receivers = open_receivers(
                rank.pool,
                transport,
                on_commit=lambda request_id, payload: self._note(request_id, payload, ""),
                on_failed=lambda request_id, reason: self._note(request_id, None, reason),
            )
        self._rank, self._group = rank, group
        follow_on_thread(rank, group, timeout_s=cluster.call_timeout_s, on_end=self._lose, name=self.name)

    def _note(self, request_id: str, payload: bytes | None, reason: str) -> None:
        self._arrivals.append((request_id, payload, reason))
        self._wake()

    def _lose(self, reason: str) -> None:
        """The group has ended; from any thread."""
        if self._lost:
            return
        self._lost = reason or "rank 0 let it go"
        self._wake()
        if reason and self._on_lost is not None:
            logger.error("%s: %s", self.name, reason)
            self._on_lost(reason)

    def _wake(self) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._news.set)

    def _check(self) -> Rank:
        if self._lost or self._rank is None:
            raise WorkerLostError(f"{self.name} is lost: {self._lost or 'it has not started'}")
        return self._rank

    def _shut(self) -> None:
        for part in (*self._senders.values(), *self._receivers.values()):
            part.close()
        if self._group is not None:
            self._group.close()
