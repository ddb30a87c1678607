"""How a request's KV travels from the worker that computes it (P, sender) to the one that decodes it (D, receiver).

D reserves pages and grants a lease (``memory/messages.py``); P opens a stream on the grant, pushes each layer's pages
as soon as they are final and commits; D commits when every (layer, page) has arrived and verified, and acknowledges;
P then frees its pages. P may be a group of ranks, each of which is a sender of its own and pushes the pages that lie
with it; all open the same grant, and it ends for all at once. D may be a group as well: each rank is a receiver of its
own and grants a lease on its share of the sequence's pages. A new transport is one module and one line in
``TRANSPORTS``.

Not here: choosing workers, and who frees pages (``cluster``, ``longctx/engine``).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from memory.config import TransportConfig
from memory.layout import KVLayout
from memory.messages import LeaseGrant
from memory.pages import PagePool
from parallel.registry import Registry


class KVReceiver(ABC):
    """One per decode worker, or rank of one: grants leases on its pages and lets senders fill them.

    Args:
        pool: where the pages are.
        config: addresses and timeouts.
        on_commit: called with (request_id, payload) once every page of the lease holds what was sent and all senders
            have committed; the payload is that of the one sender that gave one, or empty.
        on_failed: called with (request_id, reason) once the lease is fenced; its pages may be used for something else.

    For each grant exactly one of the two is called, exactly once, on a thread of the transport; neither is called after
    ``revoke`` or ``close`` has returned. They must return quickly and must not wait for a thread that is in ``revoke``.
    """

    name: str  # in TRANSPORTS
    address: str  # where senders reach it

    @abstractmethod
    def grant(
        self, request_id: str, pages: Sequence[int], *, page_idxs: Sequence[int], num_tokens: int, num_senders: int = 1
    ) -> LeaseGrant:
        """Permission to fill ``pages``, which are the sequence's pages ``page_idxs`` (rising, gaps allowed).

        ``num_senders`` senders fill them together, each whatever lies with it. The lease commits when all have, and
        fails if one aborts, is lost, breaks the protocol or is silent for ``lease_ttl_s``, counted from the grant
        until it opens the lease.

        Raises ``ValueError`` if the request already holds a live lease, a page is not in the pool, ``page_idxs`` does
        not fit ``pages`` or ``num_senders`` is below 1, ``RuntimeError`` after ``close``.
        """

    @abstractmethod
    def revoke(self, request_id: str) -> None:
        """Take the lease back: once this returns, nothing will write its pages. An unknown request is no error."""

    @property
    @abstractmethod
    def num_leases(self) -> int:
        """Live leases."""

    @property
    @abstractmethod
    def bytes_received(self) -> int:
        """Bytes of KV that arrived and verified since the start."""

    @abstractmethod
    def close(self) -> None:
        """Revoke every lease and stop every thread. Idempotent."""


class KVStream(ABC):
    """One request's way to its receiver. Callable from the engine's thread: no method blocks, they only enqueue."""

    @abstractmethod
    def send(self, layer_idx: int, page_idxs: Sequence[int], pages: Sequence[int]) -> None:
        """This layer of the sequence's pages ``page_idxs`` is final and lies in the sender's ``pages``, in that order.

        Pages that are not in the grant, before its first one or in its gaps, are skipped: they are at the receiver or
        go to another one. Neighbours in the grant that are sent together, in order, travel together. The pages must
        stay as they are until the stream is acknowledged, has failed or was aborted.

        Raises ``ValueError``, and sends nothing, for an index past the grant's last one, pages or layers outside the
        pool, and unequal lengths.
        """

    @abstractmethod
    def commit(self, payload: bytes) -> None:
        """Everything of this sender was sent. ``payload`` is handed to the receiver's ``on_commit``; of the senders
        of one lease only one may give one that is not empty."""

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Give up: the receiver's ``on_failed`` and those of the lease's other senders get ``reason``; neither callback
        of this stream starts any more."""


class KVSender(ABC):
    """One per prefill worker, or rank of one: opens streams on grants and pushes their pages on threads of its own.

    Args:
        pool: where the pages are.
        config: timeouts and frame size.
    """

    bytes_shipped: int  # bytes of KV handed to receivers since the start

    @abstractmethod
    def open(self, grant: LeaseGrant, *, on_acked: Callable[[], None], on_failed: Callable[[str], None]) -> KVStream:
        """A stream on ``grant``; does not block, the connection is made on the sender's thread.

        Unless the stream is aborted exactly one of the callbacks is called, once, on a thread of the transport:
        ``on_acked`` when the receiver has verified and committed everything, of all senders; ``on_failed`` with the
        reason when it refused, ended the lease, cannot be reached or stopped answering. Either way the pages may be
        freed.

        Raises ``ValueError`` if the grant is for another transport or another layout, ``RuntimeError`` after ``close``.
        """

    @abstractmethod
    def close(self) -> None:
        """Fail the open streams and stop every thread. Idempotent."""


class Transport:
    """A receiver and a sender that understand each other, and the pages they need. Never instantiated."""

    receiver: Callable[..., KVReceiver]  # subclasses' class
    sender: Callable[[PagePool, TransportConfig], KVSender]
    pool: Callable[[KVLayout, int], PagePool] = PagePool

    @classmethod
    def allocate(cls, layout: KVLayout, num_pages: int) -> PagePool:
        """A pool in host memory that this transport can send from; a receiver can use any pool."""
        return cls.pool(layout, num_pages)

    @classmethod
    def make_receiver(
        cls,
        pool: PagePool,
        config: TransportConfig,
        *,
        on_commit: Callable[[str, bytes], None],
        on_failed: Callable[[str, str], None],
    ) -> KVReceiver:
        """See ``KVReceiver``."""
        return cls.receiver(pool, config, on_commit=on_commit, on_failed=on_failed)

    @classmethod
    def make_sender(cls, pool: PagePool, config: TransportConfig) -> KVSender:
        """See ``KVSender``."""
        return cls.sender(pool, config)


TRANSPORTS = Registry(
    "transport",
    {
        "tcp": "memory.tcp:TcpTransport",
        "shared_memory": "memory.shared_memory:SharedMemoryTransport",
        "torch_distributed": "memory.torch_distributed:TorchDistributedTransport",
        "nixl": "memory.nixl_reads:NixlTransport",
        "object_store": "cluster.object_store:ObjectStoreTransport",  # only cluster knows Ray
    },
)
AUTO = ("tcp", "shared_memory")  # those that transport.name=auto chooses from, whatever the hosts are
