"""The receiving half of the push protocol: a listener, a thread for each connection, and a watch over the leases.

``memory/frames.py`` shows the conversation, ``memory/peer.py`` holds one end of it, ``memory/leases.py`` says why a
page whose lease has ended cannot be written any more.
"""

import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence

from memory.config import TransportConfig
from memory.frames import Waker
from memory.leases import LeaseTable
from memory.messages import LeaseGrant
from memory.node_address import node_address
from memory.pages import PagePool
from memory.peer import Peer
from memory.transport import KVReceiver

logger = logging.getLogger(__name__)

_MAX_PEERS = 512
_IDLE_S = 60.0  # how long a wait lasts that ends early when something happens
_JOIN_TIMEOUT_S = 5.0


class StreamReceiver(KVReceiver):
    """See ``KVReceiver``. Listens at a port that the system picks; raises ``OSError`` if it cannot."""

    peer_class: type[Peer]
    host: str | None = None  # to listen on; None: ``config.host``, or else this node's address
    _tls: ssl.SSLContext | None = None  # what connections are secured with

    def __init__(
        self,
        pool: PagePool,
        config: TransportConfig,
        *,
        on_commit: Callable[[str, bytes], None],
        on_failed: Callable[[str, str], None],
    ) -> None:
        self._pool = pool
        self._config = config
        self._prepare()
        self._listener = _listen(self.host or config.host or node_address())
        host, port = self._listener.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._leases = LeaseTable(
            self.name, self.address, pool=pool, ttl_s=config.lease_ttl_s, on_commit=on_commit, on_failed=on_failed
        )
        self._peers: list[Peer] = []  # the watch thread's own until it has ended
        self._closing = False
        self._lock = threading.Lock()  # guards _closing and the waker's life
        self._waker = Waker()
        self._watch = threading.Thread(target=self._run_watch, name="kv-receiver", daemon=True)
        self._watch.start()

    def _prepare(self) -> None:
        """What is needed before the first sender comes. Raises what makes receiving impossible."""

    def grant(
        self, request_id: str, pages: Sequence[int], *, page_idxs: Sequence[int], num_tokens: int, num_senders: int = 1
    ) -> LeaseGrant:
        with self._lock:
            if self._closing:
                raise RuntimeError("the receiver is closed")
            grant = self._leases.grant(
                request_id, pages, page_idxs=page_idxs, num_tokens=num_tokens, num_senders=num_senders
            )
            self._waker.set()  # the watch must know of its deadline
        return grant

    def revoke(self, request_id: str) -> None:
        self._leases.revoke(request_id)

    @property
    def num_leases(self) -> int:
        return sum(lease.live for lease in self._leases.all())

    @property
    def bytes_received(self) -> int:
        return self._leases.bytes_received

    def close(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._waker.set()
        for lease in self._leases.all():
            self._leases.revoke(lease.grant.request_id)
        self._watch.join(_JOIN_TIMEOUT_S)
        for peer in self._peers:
            peer.close()
        for peer in self._peers:
            peer.join(_JOIN_TIMEOUT_S)
        self._waker.close()

    def _run_watch(self) -> None:
        """Accept connections and end leases that ran out."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._waker.fileno(), select.POLLIN)
        while not self._closing:
            next_deadline = min((lease.deadline for lease in self._leases.all()), default=time.monotonic() + _IDLE_S)
            ready = poll.poll(max(0.0, next_deadline - time.monotonic()) * 1000 + 1)
            self._waker.clear()
            if any(fd == self._listener.fileno() for fd, _ in ready):
                self._accept()
            for lease in self._leases.all():
                self._leases.expire(lease)
        self._listener.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # the caller gave up already, or no file descriptor is left
            logger.warning("a sender could not be accepted: %s", error)
            return
        self._peers = [peer for peer in self._peers if peer.is_alive()]
        if len(self._peers) >= _MAX_PEERS:
            logger.warning("a sender is refused: there are %d connections", len(self._peers))
            sock.close()
            return
        try:
            peer = self._make_peer(sock)
            peer.start()
        except (OSError, RuntimeError) as error:  # no file descriptor or no thread is left: leases must still expire
            logger.warning("a sender could not be served: %s", error)
            sock.close()
            return
        self._peers.append(peer)

    def _make_peer(self, sock: socket.socket) -> Peer:
        """What serves an accepted connection."""
        return self.peer_class(sock, self._leases, pool=self._pool, config=self._config, tls=self._tls)


def _listen(host: str) -> socket.socket:
    """A listening socket at a port the system picks; raises ``OSError`` naming the address."""
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, 0), family=family, backlog=128)
    except OSError as error:
        raise OSError(f"transport.host={host!r} cannot be listened on: {error}") from error
    listener.setblocking(False)
    return listener
