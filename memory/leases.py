"""Leases: which (layer, page) of a request's reserved pages has arrived, and the fence that ends all writing.

How a late write is made impossible: page memory is written only by calls that do not wait (a non-blocking receive, a
memory copy), and only with the lock of the sender's session held and the lease live. ``fence`` makes the lease not live
and then takes each of these locks once. So once ``fence`` has returned, no write is in progress and none can start,
however slow, frozen or hostile the senders are; the rest of a frame is read into a scratch buffer. Fencing waits for
one such call of each sender at most, about a millisecond. The senders of one lease write at the same time.

A lease ends for all its senders at once: it commits when the last of them has, and what fails one fails all. Every
session is then told through its ``on_end``, whatever its sender is doing.
"""

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence

from memory.messages import LeaseGrant
from memory.pages import PagePool

logger = logging.getLogger(__name__)

_KEY_BYTES = 32
_LOCK_TIMEOUT_S = 5.0
_CLAIMED, _VERIFIED = 1, 2  # states of a slot; 0: nothing came yet


class LeaseError(Exception):
    """An authentic frame asks for what its lease does not allow; the lease fails."""


class Session:
    """One sender's part in a lease: the connection on which it said HELLO. That connection's thread owns it.

    Args:
        lease: what the sender may fill, together with others.
        sender_idx: which of the lease's senders this is, in the order of their HELLOs.
        key: signs the lease's frames on this connection.
        on_end: see ``Lease.open``.
    """

    def __init__(self, lease: "Lease", sender_idx: int, *, key: bytes, on_end: "OnEnd") -> None:
        self.lease = lease
        self.key = key
        self.on_end = on_end
        self.lock = threading.Lock()  # held while this sender's blocks are written; nothing else is taken meanwhile
        self.has_greeted = False  # its HELLO was accepted
        self.has_committed = False
        self._sender_idx = sender_idx

    def touch(self) -> None:
        """A valid frame came: this sender's time to live starts again."""
        self.lease.deadlines[self._sender_idx] = time.monotonic() + self.lease.grant.ttl_s


OnEnd = Callable[[Session, str | None], None]


class Lease:
    """The receiver's side of one grant.

    A *slot* is one (layer, position in ``grant.pages``). ``lock`` guards everything here; it is reentrant, so that a
    callback made under it may revoke.
    """

    def __init__(self, grant: LeaseGrant, num_layers: int) -> None:
        self.grant = grant
        self.lock = threading.RLock()
        self.live = True
        self.epoch = grant.epoch
        self.sessions: list[Session] = []
        self.payload = b""  # of the sender that committed with one
        self.num_missing = num_layers * len(grant.pages)
        self.deadlines = [time.monotonic() + grant.ttl_s] * grant.num_senders  # needs no lock: its length is fixed
        self._slots = [bytearray(len(grant.pages)) for _ in range(num_layers)]

    @property
    def deadline(self) -> float:
        """When the sender that has been silent for longest must have been heard; one without HELLO counts too."""
        return min(self.deadlines)

    @property
    def num_committed(self) -> int:
        """Senders that have sent everything of their own."""
        return sum(session.has_committed for session in self.sessions)

    def open(self, *, key: bytes, on_end: OnEnd) -> Session | None:
        """A place for one more sender; None if all are taken or the lease has ended.

        ``on_end`` is called once, with the session and the reason why the lease failed (None: it was committed), under
        the lease's lock and on any thread: it must not wait.
        """
        with self.lock:
            if not self.live or len(self.sessions) == self.grant.num_senders:
                return None
            session = Session(self, len(self.sessions), key=key, on_end=on_end)
            self.sessions.append(session)
        session.touch()
        return session

    def claim(self, layer_idx: int, first_slot: int, count: int) -> tuple[int, ...]:
        """Page ids of ``count`` slots, which nobody may claim again; raises ``LeaseError`` if that is not allowed."""
        num_slots = len(self.grant.pages)
        if layer_idx >= len(self._slots):
            raise LeaseError(f"layer {layer_idx} is not in the pool, which has {len(self._slots)}")
        if not count or first_slot + count > num_slots:
            raise LeaseError(f"pages {first_slot}..{first_slot + count} are not in the lease, which has {num_slots}")
        span = slice(first_slot, first_slot + count)
        with self.lock:
            if any(self._slots[layer_idx][span]):
                raise LeaseError(f"pages {first_slot}..{first_slot + count} of layer {layer_idx} were sent before")
            self._slots[layer_idx][span] = bytes([_CLAIMED]) * count
        return self.grant.pages[span]

    def settle(self, layer_idx: int, first_slot: int, count: int) -> None:
        """Claimed slots hold what was sent. The caller has the lock."""
        self._slots[layer_idx][first_slot : first_slot + count] = bytes([_VERIFIED]) * count
        self.num_missing -= count

    def fence(self) -> bool:
        """End all writing; false if somebody has fenced the lease before. See the module's docstring."""
        with self.lock:
            was_live, self.live = self.live, False
            self.epoch += was_live
            for session in self.sessions:
                with session.lock:
                    pass  # a write that found the lease live is over
        return was_live


class LeaseTable:
    """The leases of one receiver. Thread-safe; its own lock is never held while a lease's is taken.

    Args:
        transport: registry name, for the grants.
        address: where the receiver listens.
        pool: what the pages are part of.
        ttl_s: seconds without progress of one of its senders after which a lease expires.
        on_commit, on_failed: see ``KVReceiver``.
    """

    def __init__(
        self,
        transport: str,
        address: str,
        *,
        pool: PagePool,
        ttl_s: float,
        on_commit: Callable[[str, bytes], None],
        on_failed: Callable[[str, str], None],
    ) -> None:
        self.bytes_received = 0
        self._on_commit = on_commit
        self._on_failed = on_failed
        self._transport = transport
        self._address = address
        self._pool = pool
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._epoch = secrets.randbelow(1 << 30)  # unlike that of an earlier receiver with this address
        self._by_id: dict[int, Lease] = {}
        self._by_request: dict[str, Lease] = {}

    def grant(
        self, request_id: str, pages: Sequence[int], *, page_idxs: Sequence[int], num_tokens: int, num_senders: int = 1
    ) -> LeaseGrant:
        """See ``KVReceiver.grant``."""
        self._check(pages, page_idxs, num_senders)
        with self._lock:
            holder = self._by_request.get(request_id)
            if holder is not None and holder.live:
                raise ValueError(f"request {request_id!r} already holds lease {holder.grant.lease_id}")
            grant = LeaseGrant(
                lease_id=next(self._ids),
                epoch=self._epoch,
                request_id=request_id,
                transport=self._transport,
                address=self._address,
                pages=tuple(pages),
                page_idxs=tuple(page_idxs),
                num_tokens=num_tokens,
                layout=self._pool.layout,
                ttl_s=self._ttl_s,
                key=secrets.token_bytes(_KEY_BYTES),
                num_senders=num_senders,
            )
            lease = Lease(grant, self._pool.layout.num_layers)
            self._by_id[grant.lease_id] = self._by_request[request_id] = lease
        return grant

    def find(self, lease_id: int) -> Lease | None:
        """The lease, if it is live; one that has run out is ended."""
        lease = self._by_id.get(lease_id)
        if lease:
            self.expire(lease)
        return lease if lease and lease.live else None

    def all(self) -> list[Lease]:
        """Every lease there is, a few of which may be fenced already."""
        with self._lock:
            return list(self._by_id.values())

    def revoke(self, request_id: str) -> None:
        """See ``KVReceiver.revoke``."""
        lease = self._by_request.get(request_id)
        if lease is None:
            return
        # Others hold the lock to count what came, or for a callback, before which they fence the lease.
        if not lease.lock.acquire(timeout=_LOCK_TIMEOUT_S):
            logger.error("request %s: the callback of its lease does not return", request_id)
            return
        try:
            self._end(lease, lambda: None, failure="the lease was revoked")
        finally:
            lease.lock.release()

    def count(self, num_bytes: int) -> None:
        """So many bytes of KV arrived and verified."""
        with self._lock:
            self.bytes_received += num_bytes

    def commit(self, session: Session, payload: bytes) -> None:
        """This sender has sent everything of its own; the last one's commit ends the lease.

        Raises ``LeaseError`` if a slot is missing then, if another sender gave a payload too, and if this one has
        committed before. Does nothing if the lease has ended: the sender is told of that.
        """
        lease = session.lease
        with lease.lock:
            if not lease.live:
                return
            if session.has_committed:
                raise LeaseError("a sender committed twice")
            if payload and lease.payload:
                raise LeaseError("two senders committed with a payload; one may")
            session.has_committed = True
            lease.payload = payload or lease.payload
            if lease.num_committed < lease.grant.num_senders:
                return
            if lease.num_missing:
                raise LeaseError(f"commit with {lease.num_missing} blocks missing")
            self._end(lease, lambda: self._on_commit(lease.grant.request_id, lease.payload), failure=None)

    def fail(self, lease: Lease, reason: str) -> None:
        """End a lease unless it has ended."""
        self._end(lease, lambda: self._on_failed(lease.grant.request_id, reason), failure=reason)

    def expire(self, lease: Lease) -> None:
        """End a lease if one of its senders has been silent for too long."""
        if lease.deadline <= time.monotonic():
            self.fail(lease, f"a sender made no progress for {lease.grant.ttl_s:g} s")

    def _check(self, pages: Sequence[int], page_idxs: Sequence[int], num_senders: int) -> None:
        """Raise ``ValueError`` if such a lease cannot be granted."""
        wrong = [page for page in pages if not 0 <= page < self._pool.num_pages]
        if wrong or len(set(pages)) != len(pages):
            allowed = f"0..{self._pool.num_pages - 1}, each once"
            raise ValueError(f"pages {wrong or list(pages)} cannot be leased; allowed: {allowed}")
        if len(page_idxs) != len(pages):
            raise ValueError(f"page_idxs has {len(page_idxs)} entries for {len(pages)} pages; allowed: one for each")
        if any(idx <= previous for previous, idx in itertools.pairwise([-1, *page_idxs])):
            raise ValueError(f"page_idxs={list(page_idxs)} is not allowed: rising, from 0 or later")
        if num_senders < 1:
            raise ValueError(f"num_senders={num_senders} is not allowed: at least 1")

    def _end(self, lease: Lease, callback: Callable[[], None], *, failure: str | None) -> None:
        """Fence the lease, call back and tell its senders, unless it was fenced.

        All under the lease's lock, so that ``revoke`` can promise that nothing is called after it, and that a frame
        which finds the lease ended is answered after what its end tells the sender.
        """
        with lease.lock:
            if not lease.fence():
                return
            try:
                callback()
            except Exception:  # the engine's defect: the transport goes on serving other leases
                logger.exception("callback of request %s", lease.grant.request_id)
            self._remove(lease)
            for session in lease.sessions:
                session.on_end(session, failure)

    def _remove(self, lease: Lease) -> None:
        with self._lock:
            self._by_id.pop(lease.grant.lease_id, None)
            if self._by_request.get(lease.grant.request_id) is lease:
                del self._by_request[lease.grant.request_id]
