"""Leases: which (layer, page) of a request's reserved pages has arrived, and the fence that ends all writing.

How a late write is made impossible: page memory is written only by calls that do not wait (a non-blocking receive, a
memory copy), and only with the lease's lock held and the lease live. ``fence`` takes the same lock. So once ``fence``
has returned, no write is in progress and none can start, however slow, frozen or hostile the sender is; the rest of its
frame is read into a scratch buffer. Fencing waits for one such call at most, about a millisecond.
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


class Lease:
    """The receiver's side of one grant.

    A *slot* is one (layer, position in ``grant.pages``). ``lock`` guards everything here and every write to the pages;
    it is reentrant, so that a callback made under it may revoke.
    """

    def __init__(self, grant: LeaseGrant, num_layers: int) -> None:
        self.grant = grant
        self.lock = threading.RLock()
        self.live = True
        self.epoch = grant.epoch
        self.owner: object | None = None  # the connection that may fill it, once one has said HELLO
        self.session_key = b""  # signs frames on that connection
        self.num_missing = num_layers * len(grant.pages)
        self._slots = [bytearray(len(grant.pages)) for _ in range(num_layers)]
        self.touch()

    def touch(self) -> None:
        """A valid frame came: the time to live starts again."""
        self.deadline = time.monotonic() + self.grant.ttl_s

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
        return was_live


class LeaseTable:
    """The leases of one receiver. Thread-safe; its own lock is never held while a lease's is taken.

    Args:
        transport: registry name, for the grants.
        address: where the receiver listens.
        pool: what the pages are part of.
        ttl_s: seconds without progress after which a lease expires.
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

    def grant(self, request_id: str, pages: Sequence[int], *, first_page_idx: int, num_tokens: int) -> LeaseGrant:
        """See ``KVReceiver.grant``."""
        wrong = [page for page in pages if not 0 <= page < self._pool.num_pages]
        if wrong or len(set(pages)) != len(pages):
            allowed = f"0..{self._pool.num_pages - 1}, each once"
            raise ValueError(f"pages {wrong or list(pages)} cannot be leased; allowed: {allowed}")
        if first_page_idx < 0:
            raise ValueError(f"first_page_idx={first_page_idx} is not allowed: at least 0")
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
                first_page_idx=first_page_idx,
                num_tokens=num_tokens,
                layout_digest=self._pool.layout.digest(),
                ttl_s=self._ttl_s,
                key=secrets.token_bytes(_KEY_BYTES),
            )
            lease = Lease(grant, self._pool.layout.num_layers)
            self._by_id[grant.lease_id] = self._by_request[request_id] = lease
        return grant

    def find(self, lease_id: int) -> Lease | None:
        """The lease, if it is live and has not run out."""
        lease = self._by_id.get(lease_id)
        return lease if lease and lease.live and lease.deadline > time.monotonic() else None

    def all(self) -> list[Lease]:
        """Every lease there is, a few of which may be fenced already."""
        with self._lock:
            return list(self._by_id.values())

    def revoke(self, request_id: str) -> None:
        """See ``KVReceiver.revoke``."""
        lease = self._by_request.get(request_id)
        if lease is None:
            return
        # Others hold the lock for a write that does not wait, or for a callback, before which they fence the lease.
        if not lease.lock.acquire(timeout=_LOCK_TIMEOUT_S):
            logger.error("request %s: the callback of its lease does not return", request_id)
            return
        try:
            if lease.fence():
                self._remove(lease)
        finally:
            lease.lock.release()

    def count(self, num_bytes: int) -> None:
        """So many bytes of KV arrived and verified."""
        with self._lock:
            self.bytes_received += num_bytes

    def commit(self, lease: Lease, payload: bytes) -> None:
        """End a lease whose every slot has arrived; raises ``LeaseError`` if one has not, or if the lease has ended."""
        if lease.num_missing:
            raise LeaseError(f"commit with {lease.num_missing} blocks missing")
        if not self._end(lease, lambda: self._on_commit(lease.grant.request_id, payload)):
            raise LeaseError("the lease ended before the commit")

    def fail(self, lease: Lease, reason: str) -> None:
        """End a lease unless it has ended."""
        self._end(lease, lambda: self._on_failed(lease.grant.request_id, reason))

    def _end(self, lease: Lease, callback: Callable[[], None]) -> bool:
        """Fence the lease and call back, unless it was fenced; false then.

        All under the lease's lock, so that ``revoke`` can promise that nothing is called after it.
        """
        with lease.lock:
            if not lease.fence():
                return False
            try:
                callback()
            except Exception:  # the engine's defect: the transport goes on serving other leases
                logger.exception("callback of request %s", lease.grant.request_id)
            self._remove(lease)
        return True

    def _remove(self, lease: Lease) -> None:
        with self._lock:
            self._by_id.pop(lease.grant.lease_id, None)
            if self._by_request.get(lease.grant.request_id) is lease:
                del self._by_request[lease.grant.request_id]
