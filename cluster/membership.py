"""The workers of a deployment as its router knows them: who there is, who generates, who has come and gone."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from cluster.config import ServeConfig
from cluster.handle import Roster, WorkerHandle
from cluster.peer import Connect, WorkerPeer
from cluster.serving import Health, WorkerStats
from cluster.worker_line import connect
from memory.config import TransportConfig
from memory.tls import make_context

logger = logging.getLogger(__name__)

ROSTER_INTERVAL_S = 1.0  # between two looks at which workers there are


class Membership:
    """All workers, lost ones too until the roster has them no more.

    Args:
        handles: those there are at first.
        config: the deployment's.
        any_role: each of them may generate, whatever it was started for.
    """

    def __init__(self, handles: Sequence[WorkerHandle], config: ServeConfig, *, any_role: bool) -> None:
        self._config, self._any_role = config, any_role
        self._connect = _make_connect(config.transport)
        self._peers = [self._make_peer(handle) for handle in handles]

    def __iter__(self) -> Iterator[WorkerPeer]:
        return iter(self._peers)

    def __contains__(self, peer: object) -> bool:
        return peer in self._peers

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def decoders(self) -> list[WorkerPeer]:
        """The workers that may generate."""
        return [peer for peer in self._peers if self._any_role or peer.role == "decode"]

    @property
    def has_decode(self) -> bool:
        """Whether one of them takes requests."""
        return any(peer.is_open for peer in self.decoders)

    def health(self) -> Health:
        """Ready while a decode worker is."""
        workers = tuple(peer.health() for peer in self._peers)
        reasons = [f"{worker.name}: {worker.reason}" for worker in workers if not worker.ready]
        return Health(self.has_decode, "; ".join(reasons), workers)

    def stats(self) -> list[WorkerStats]:
        """Every worker, as last heard."""
        return [peer.describe() for peer in self._peers]

    async def watch(self, roster: Roster, follow: Callable[[WorkerPeer], None]) -> None:
        """Take in workers that have come, for ``follow`` to poll, and forget those that have gone; without end."""
        while True:
            await asyncio.sleep(ROSTER_INTERVAL_S)
            try:
                handles = {handle.name: handle for handle in await roster()}
            except Exception as error:  # noqa: BLE001 - who there was is still there, as far as is known
                logger.warning("which workers there are is not known: %s", error)
                continue
            for name in handles.keys() - {peer.name for peer in self._peers}:
                logger.info("%s has come", name)
                self._peers.append(self._make_peer(handles[name]))
                follow(self._peers[-1])
            for peer in [peer for peer in self._peers if not peer.is_alive]:
                if peer.name in handles:
                    peer.handle = handles[peer.name]  # another one may have its name by now
                else:
                    logger.info("%s has gone", peer.name)
                    self._peers.remove(peer)

    def _make_peer(self, handle: WorkerHandle) -> WorkerPeer:
        return WorkerPeer(handle, self._config.cluster.call_timeout_s, self._config.digest, self._connect)


def _make_connect(transport: TransportConfig) -> Connect | None:
    """How this process reaches workers; None: by Ray alone."""
    try:
        context = make_context(transport, server_side=False)
    except ValueError as error:
        logger.warning("%s; tokens come by Ray's calls, milliseconds later each", error)
        return None
    return partial(connect, context=context, timeout_s=transport.connect_timeout_s)
