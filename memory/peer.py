"""One connection from a sender: its thread reads frames, decides which are entitled to what, and answers.

Leases also end on other threads (another sender's commit or failure, expiry, a revocation). Their sessions here are
then queued and the thread is woken, which says ACK or NACK before it answers any frame of such a lease.

Subclasses say how a DATA frame's blocks get into the pages: out of the socket, or out of the sender's memory.
"""

import logging
import secrets
import select
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from memory.config import TransportConfig
from memory.frames import (
    HEADER_BYTES,
    NONCE_BYTES,
    FrameError,
    FrameSocket,
    Header,
    Kind,
    Waker,
    checksum,
    control,
    is_signed,
    read_object,
    session_key,
)
from memory.leases import Lease, LeaseError, LeaseTable, Session
from memory.pages import PagePool
from memory.staging import make_blocks
from memory.tls import TlsSocket

logger = logging.getLogger(__name__)

_IDLE_S = 60.0  # how long a wait lasts that ends early when something happens
_MAX_REASON = 500  # characters of a reason that travel


class FrameRefused(Exception):
    """A frame that is not its lease's (unknown, stale, forged): it is dropped and the lease goes on."""


class Peer(threading.Thread, ABC):
    """Serves one connection until it ends or misbehaves.

    Args:
        sock: the accepted connection, owned from here on.
        leases: the receiver's.
        pool: the receiver's.
        config: timeouts.
        tls: what the connection is secured with.
    """

    def __init__(
        self,
        sock: socket.socket,
        leases: LeaseTable,
        *,
        pool: PagePool,
        config: TransportConfig,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(name="kv-peer", daemon=True)
        self._waker = Waker()
        self._channel = (
            TlsSocket(sock, self._waker, context=tls, server_side=True) if tls else FrameSocket(sock, self._waker)
        )
        self._leases = leases
        self._pool = pool
        self._config = config
        self._blocks = make_blocks(pool)
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._answer_due = float("inf")  # when a sender that goes on sending must hear something
        self._opened: dict[int, Session] = {}  # of leases that said HELLO here, by lease id; the thread's own
        self._ended: deque[tuple[Session, str | None]] = deque()  # of them those whose lease has ended, and why
        self._lock = threading.Lock()  # guards _is_over and the waker's life
        self._is_over = False

    def close(self) -> None:
        """End the connection soon; any thread may call this."""
        self._channel.shutdown()

    def run(self) -> None:
        """Serve frames; whatever ends the connection fails the leases bound to it."""
        reason = "the transport failed, see the log"
        try:
            self._serve()
        except (OSError, FrameError) as error:
            reason = f"the sender is gone: {error}"
        except Exception:
            logger.exception("connection from a sender")  # a defect; the leases must be freed all the same
        finally:
            self._leave()
            self._channel.close()
            with self._lock:
                self._is_over = True
                self._waker.close()
            for session in self._opened.values():
                self._leases.fail(session.lease, reason)

    @abstractmethod
    def _place(self, session: Session, header: Header, pages: Sequence[int], deadline: float) -> bool:
        """Put a DATA frame's blocks into ``pages``, and say whether they are what was sent.

        Reads the frame's whole payload from the connection until ``deadline``. Every write must be made without
        waiting, with ``session.lock`` held and ``session.lease.live``; what comes after a fence is not written.
        """

    def _fits(self, header: Header) -> bool:
        """Whether a DATA frame's payload can be one of its pages."""
        return header.payload_bytes == header.num_pages * self._pool.layout.block_bytes

    def _skip(self, header: Header, deadline: float) -> None:
        """Read a frame that is not served to its end."""
        self._channel.drain(header.payload_bytes, deadline)

    def _leave(self) -> None:
        """The connection is over."""

    def _put(self, session: Session, header: Header, pages: Sequence[int], blocks: np.ndarray) -> None:
        """Write verified blocks, uint8 ``[num_bytes]`` in the order of ``pages``, unless the lease was fenced."""
        with session.lock:
            if not session.lease.live:
                return
            start = 0
            for target in self._blocks.targets(header.layer_idx, pages):
                np.copyto(np.frombuffer(target, dtype=np.uint8), blocks[start : start + len(target)])
                start += len(target)
            self._blocks.settle(header.layer_idx, pages)

    def _greet(self, lease: Lease, details: dict[str, Any]) -> None:
        """Look at what a HELLO says; raises ``LeaseError`` if the sender's pages cannot be used here."""
        theirs, ours = details.get("layout"), self._pool.layout.digest()
        if theirs != ours:
            raise LeaseError(f"the sender's KV layout is {theirs}, the receiver's {ours}")

    def _serve(self) -> None:
        """Serve frames; returns never, an error ends it."""
        trusted_by = time.monotonic() + self._config.connect_timeout_s
        is_trusted = False  # whether a frame was signed as it should be
        self._channel.secure(trusted_by)
        self._channel.send(control(Kind.WELCOME, 0, 0, self._nonce, key=b""), trusted_by)
        while True:
            self._tell_ends()
            if not is_trusted and time.monotonic() >= trusted_by:  # whatever else came
                raise TimeoutError("no valid frame came in time")
            if self._channel.wait(select.POLLIN, time.monotonic() + _IDLE_S if is_trusted else trusted_by):
                is_trusted |= self._serve_frame(time.monotonic() + self._config.send_timeout_s)

    def _serve_frame(self, deadline: float) -> bool:
        """Read and serve one frame; whether it was authentic. A bad one is answered with NACK."""
        raw = self._channel.receive(HEADER_BYTES, deadline)
        header = Header.unpack(raw)
        try:
            session = self._admit(raw, header)
        except FrameRefused as refusal:
            self._refuse(header, str(refusal), deadline)
            return False
        session.touch()
        try:
            self._serve_admitted(session, header, deadline)
        except LeaseError as error:
            self._leases.fail(session.lease, str(error)[:_MAX_REASON])
        return True

    def _admit(self, raw: bytearray, header: Header) -> Session:
        """Whose frame this is, if it is entitled to its lease; raises ``FrameRefused``. HELLO takes a place in it."""
        lease = self._leases.find(header.lease_id)
        if lease is None:
            raise _not_live(header)
        session = self._opened.get(header.lease_id)
        if session is None and header.kind != Kind.HELLO:
            raise FrameRefused(f"lease {header.lease_id} is not open on this connection")
        key = session.key if session else session_key(lease.grant.key, self._nonce)
        if not is_signed(raw, key):
            raise FrameRefused(f"the frame is not signed with the key of lease {header.lease_id}")
        if header.epoch != lease.epoch and lease.live:
            raise FrameRefused(f"epoch {header.epoch} of lease {header.lease_id} is over")
        if not lease.live:  # it has ended since it was found
            raise _not_live(header)
        session = session or lease.open(key=key, on_end=self._note_end)
        if session is None:
            full = FrameRefused(f"lease {header.lease_id} is open on as many connections as it may be")
            raise full if lease.live else _not_live(header)
        self._opened[header.lease_id] = session
        return session

    def _refuse(self, header: Header, reason: str, deadline: float) -> None:
        """Answer a frame with NACK, unless its lease was open here and has ended: that is the answer."""
        self._skip(header, deadline)
        session = self._opened.get(header.lease_id)
        if session:
            with session.lease.lock:
                pass  # somebody who is ending the lease has queued our answer when the lock is free
            self._tell_ends()
        if not session or header.lease_id in self._opened:
            self._answer(Kind.NACK, header, reason, deadline=deadline)

    def _serve_admitted(self, session: Session, header: Header, deadline: float) -> None:
        """Serve an authentic frame; raises ``LeaseError`` if the lease must fail."""
        if header.kind == Kind.DATA:
            self._take_blocks(session, header, deadline)
            if time.monotonic() >= self._answer_due:  # many frames may wait here before the sender's next PING
                self._answer(Kind.PONG, header, key=session.key, deadline=deadline)
            return
        payload = bytes(self._channel.receive(header.payload_bytes, deadline))
        if checksum([payload]) != header.checksum:
            raise LeaseError("a control frame's payload does not match its checksum")
        if header.kind == Kind.HELLO:
            self._take_greeting(session, payload)
            self._answer(Kind.PONG, header, key=session.key, deadline=deadline)
        elif header.kind == Kind.PING:
            self._answer(Kind.PONG, header, key=session.key, deadline=deadline)
        elif header.kind == Kind.COMMIT:
            self._leases.commit(session, payload)
        elif header.kind == Kind.ABORT:
            self._leases.fail(session.lease, payload.decode(errors="replace")[:_MAX_REASON])
        else:
            raise LeaseError(f"frames of kind {header.kind} are not for receivers")

    def _take_greeting(self, session: Session, payload: bytes) -> None:
        """Serve HELLO's payload."""
        if session.has_greeted:
            raise LeaseError("a sender opened the lease twice")
        try:
            details = read_object(payload)
        except ValueError as error:
            raise LeaseError(f"HELLO: {error}") from None
        self._greet(session.lease, details)
        session.has_greeted = True

    def _take_blocks(self, session: Session, header: Header, deadline: float) -> None:
        """Fill a DATA frame's pages, verify them and count them."""
        lease, layer_idx, first, count = session.lease, header.layer_idx, header.first_slot, header.num_pages
        try:
            if session.has_committed:
                raise LeaseError("a sender sent pages after its commit")
            pages = lease.claim(layer_idx, first, count)
            if not self._fits(header):
                raise LeaseError(f"{header.payload_bytes} bytes for {count} pages of {self._pool.layout.block_bytes}")
        except LeaseError:
            self._skip(header, deadline)
            raise
        matches = self._place(session, header, pages, deadline)
        with lease.lock:
            if not lease.live:
                return  # fenced meanwhile: the sender is told of that
            if not matches:
                raise LeaseError(f"pages {first}..{first + count} of layer {layer_idx} do not match their checksum")
            lease.settle(layer_idx, first, count)
        self._leases.count(count * self._pool.layout.block_bytes)
        session.touch()

    def _note_end(self, session: Session, failure: str | None) -> None:
        """A lease that is open here has ended; any thread may call this."""
        with self._lock:
            if not self._is_over:
                self._ended.append((session, failure))
                self._waker.set()

    def _tell_ends(self) -> None:
        """Say ACK or NACK for every lease that has ended; its later frames are refused like any stranger's."""
        while self._ended:
            session, failure = self._ended.popleft()
            grant = session.lease.grant
            del self._opened[grant.lease_id]
            header = Header(Kind.COMMIT, grant.lease_id, grant.epoch)
            deadline = time.monotonic() + self._config.send_timeout_s
            if failure is None:
                self._answer(Kind.ACK, header, key=session.key, deadline=deadline)
            else:
                self._answer(Kind.NACK, header, failure, deadline=deadline)

    def _answer(self, kind: Kind, header: Header, reason: str = "", *, key: bytes = b"", deadline: float) -> None:
        """Answer a frame. A NACK needs no signature: who can forge one can as well cut the connection."""
        self._answer_due = time.monotonic() + self._config.send_timeout_s / 4
        payload = reason[:_MAX_REASON].encode()
        self._channel.send(control(kind, header.lease_id, header.epoch, payload, key=key), deadline)


def _not_live(header: Header) -> FrameRefused:
    return FrameRefused(f"lease {header.lease_id} was never granted, or is committed, expired or revoked")


class FillingPeer(Peer):
    """Has blocks written straight into the pages, and looks at their checksum there."""

    @abstractmethod
    def _fill(self, session: Session, header: Header, targets: Sequence[memoryview], deadline: float) -> int:
        """Put a DATA frame's blocks into ``targets``, and return the checksum they must have. See ``Peer._place``."""

    def _place(self, session: Session, header: Header, pages: Sequence[int], deadline: float) -> bool:
        targets = self._blocks.targets(header.layer_idx, pages)
        expected = self._fill(session, header, targets, deadline)
        matches = checksum(targets) == expected
        with session.lock:
            if matches and session.lease.live:
                self._blocks.settle(header.layer_idx, pages)
        return matches
