"""Frames of the push protocol, and sockets that carry them without ever waiting past a deadline.

A frame is a 64-byte header and a payload. The header ends with an HMAC of the rest of it, which covers the payload
through its checksum. The key of the HMAC is the lease's, mixed with a nonce that the receiver draws for each
connection: a frame recorded on one connection is worthless on another. The checksum (xxh3) finds corruption and pages
that were reused too early; it is no defence against somebody who can alter packets in flight, and nothing is encrypted.

    sender                        receiver
      |  <------------------ WELCOME  nonce
      |  HELLO  layout  ----------->  this connection is one of the lease's senders
      |  DATA   blocks  ----------->  ... many, of many leases
      |  PING ------> PONG            both sides learn that the other is alive
      |  COMMIT payload ----------->  everything of this sender was sent
      |  <------------------ ACK      once all of the lease's senders have committed

Instead of ACK the receiver says NACK with a reason, at any point and unasked, when it ends the lease: what one sender
does wrong, all hear. It also answers with NACK a frame that belongs to no lease of this connection. What it says of a
lease's end comes before what it says to later frames of that lease.
"""

import hmac
import json
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import xxhash

MAGIC = b"LCKV"
VERSION = 1
_FIELDS = struct.Struct("<4sBBHQIIIIQQ")  # magic, version, kind, 0, then the fields of Header in order
_MAC_BYTES = 16
HEADER_BYTES = _FIELDS.size + _MAC_BYTES
NONCE_BYTES = 16
MAX_CONTROL_BYTES = 1 << 20  # payload of any frame but DATA
MAX_ANSWER_BYTES = 1 << 12  # payload of what a receiver says: a nonce, or a reason
MAX_FRAME_BYTES = 1 << 30
MAX_FRAME_PAGES = 512  # keeps one frame's buffers under the kernel's limit of 1024
_SCRATCH_BYTES = 1 << 16

Buffer = bytes | bytearray | memoryview


class FrameError(Exception):
    """The bytes on a connection are not frames of this protocol; the connection is of no more use."""


class Kind(IntEnum):
    """What a frame is."""

    WELCOME = 1
    HELLO = 2
    DATA = 3
    COMMIT = 4
    ABORT = 5
    PING = 6
    ACK = 7
    NACK = 8
    PONG = 9


@dataclass(frozen=True, slots=True)
class Header:
    """A frame's header. ``first_slot`` and ``num_pages`` count positions in the lease, not page ids."""

    kind: int
    lease_id: int = 0
    epoch: int = 0
    layer_idx: int = 0
    first_slot: int = 0
    num_pages: int = 0
    payload_bytes: int = 0
    checksum: int = 0  # xxh3_64 of the payload

    def pack(self, key: bytes) -> bytes:
        """The header's bytes, signed with ``key``; an empty key leaves it unsigned."""
        fields = _FIELDS.pack(
            MAGIC, VERSION, self.kind, 0, self.lease_id, self.epoch, self.layer_idx, self.first_slot, self.num_pages,
            self.payload_bytes, self.checksum,
        )  # fmt: skip
        return fields + (_mac(fields, key) if key else bytes(_MAC_BYTES))

    @classmethod
    def unpack(cls, raw: Buffer, *, is_answer: bool = False) -> "Header":
        """Read ``HEADER_BYTES`` bytes, a receiver's with ``is_answer``; checks no signature.

        Raises ``FrameError`` if they are none of this version, or announce more than such a frame may hold.
        """
        magic, version, kind, zero, *fields = _FIELDS.unpack_from(raw)
        if magic != MAGIC or version != VERSION or zero:
            raise FrameError(f"not a frame of protocol {MAGIC.decode()} version {VERSION}")
        header = cls(kind, *fields)
        limit = MAX_FRAME_BYTES if kind == Kind.DATA else MAX_CONTROL_BYTES
        limit = MAX_ANSWER_BYTES if is_answer else limit
        if header.num_pages > MAX_FRAME_PAGES:
            raise FrameError(f"a frame of {header.num_pages} pages; at most {MAX_FRAME_PAGES} are allowed")
        if header.payload_bytes > limit:
            raise FrameError(f"a payload of {header.payload_bytes} bytes; at most {limit} are allowed")
        return header


def is_signed(raw: Buffer, key: bytes) -> bool:
    """Whether a packed header carries the signature that ``key`` gives."""
    return hmac.compare_digest(_mac(raw[: _FIELDS.size], key), bytes(raw[_FIELDS.size : HEADER_BYTES]))


def session_key(lease_key: bytes, nonce: bytes) -> bytes:
    """What signs one lease's frames on the connection that drew ``nonce``."""
    return hmac.digest(lease_key, nonce, "sha256")


def checksum(buffers: Sequence[Buffer]) -> int:
    """xxh3_64 of the buffers' concatenation. xxhash lets other threads run while it hashes."""
    if len(buffers) == 1:
        return xxhash.xxh3_64_intdigest(buffers[0])
    digest = xxhash.xxh3_64()
    for buffer in buffers:
        digest.update(buffer)
    return digest.intdigest()


def control(kind: Kind, lease_id: int, epoch: int, payload: bytes, *, key: bytes) -> list[Buffer]:
    """The buffers of a frame that carries no blocks."""
    header = Header(kind, lease_id, epoch, payload_bytes=len(payload), checksum=checksum([payload]))
    return [header.pack(key), payload] if payload else [header.pack(key)]


def read_object(payload: Buffer) -> dict[str, Any]:
    """The JSON object in a payload, all of it text that can be quoted; raises ``ValueError``."""
    try:
        content = json.loads(bytes(payload))
        json.dumps(content, ensure_ascii=False).encode()  # JSON can escape half a surrogate pair
    except (ValueError, RecursionError):
        raise ValueError("the payload is not JSON") from None
    if not isinstance(content, dict):
        raise ValueError("the payload is not an object")
    return content


def _mac(fields: Buffer, key: bytes) -> bytes:
    return hmac.digest(key, fields, "sha256")[:_MAC_BYTES]


class Cursor:
    """What is left to send or to fill of a list of buffers; empty is false."""

    def __init__(self, buffers: Iterable[Buffer]) -> None:
        self._buffers = [memoryview(buffer) for buffer in buffers]
        self._head = 0
        self.remaining = sum(map(len, self._buffers))

    def __bool__(self) -> bool:
        return self.remaining > 0

    @property
    def buffers(self) -> list[memoryview]:
        """The buffers from the current byte on."""
        return self._buffers[self._head :] if self._head else self._buffers

    def advance(self, num_bytes: int) -> None:
        """Count ``num_bytes`` as done."""
        self.remaining -= num_bytes
        while num_bytes:
            head = self._buffers[self._head]
            if num_bytes < len(head):
                self._buffers[self._head] = head[num_bytes:]
                return
            num_bytes -= len(head)
            self._head += 1


class Waker:
    """Ends another thread's ``FrameSocket.wait``."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._is_set = False

    def fileno(self) -> int:
        """What to poll."""
        return self._reader.fileno()

    def set(self) -> None:
        """End the current wait, or the next one. Never blocks."""
        if not self._is_set:
            self._is_set = True
            self._writer.send(b"\0")

    def clear(self) -> None:
        """Forget earlier calls. The waiting thread looks at what it was woken for after this, not before."""
        with suppress(BlockingIOError):  # not woken
            self._reader.recv(4096)
        self._is_set = False  # last: a ``set`` in between must not be drained and remembered at once

    def close(self) -> None:
        """Close both ends."""
        self._reader.close()
        self._writer.close()


class FrameSocket:
    """A connected socket that one thread reads and writes; every wait has a deadline (``time.monotonic`` seconds).

    Running past a deadline raises ``TimeoutError``, the peer's end of the connection ``ConnectionError``.
    """

    def __init__(self, sock: socket.socket, waker: Waker | None = None) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):  # Linux's names
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._socket = sock
        self._waker = waker
        self._poll = select.poll()
        if waker:
            self._poll.register(waker.fileno(), select.POLLIN)

    def wait(self, events: int, deadline: float) -> int:
        """The poll events of the socket that are ready; 0 at the deadline or when woken."""
        self._poll.register(self._socket, events)
        timeout_ms = max(0.0, deadline - time.monotonic()) * 1000
        ready = 0
        for fd, flags in self._poll.poll(timeout_ms):
            if self._waker and fd == self._waker.fileno():
                self._waker.clear()
            else:
                ready = flags
        return ready

    def send(
        self, buffers: Iterable[Buffer], deadline: float, *, on_readable: Callable[[], None] | None = None
    ) -> None:
        """Write all of ``buffers``; ``on_readable`` is called when the peer says something meanwhile."""
        cursor = Cursor(buffers)
        events = select.POLLOUT | (select.POLLIN if on_readable else 0)
        while cursor:
            if sent := self._send_some(cursor):
                cursor.advance(sent)
                continue
            ready = self.wait(events, deadline)
            if on_readable and ready & select.POLLIN:
                on_readable()
            if not ready & select.POLLOUT and time.monotonic() >= deadline:  # however much it says meanwhile
                raise TimeoutError(f"the peer took no data in time, {cursor.remaining} bytes are left")

    def _send_some(self, cursor: Cursor) -> int:
        """Bytes that the kernel took at once."""
        try:
            return self._socket.sendmsg(cursor.buffers, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def secure(self, deadline: float) -> None:
        """Agree with the other end about encryption, if there is to be any."""

    def receive_some(self, cursor: Cursor) -> int:
        """Bytes that were there at once and were written to the cursor's buffers; 0 if none were."""
        try:
            num_bytes = self._socket.recvmsg_into(cursor.buffers)[0]
        except BlockingIOError:
            return 0
        if not num_bytes:
            raise ConnectionError("the peer closed the connection")
        cursor.advance(num_bytes)
        return num_bytes

    def await_data(self, deadline: float) -> None:
        """Wait until something can be read."""
        if not self.wait(select.POLLIN, deadline) and time.monotonic() >= deadline:
            raise TimeoutError("the peer stopped in the middle of a frame")

    def receive(self, num_bytes: int, deadline: float) -> bytearray:
        """Exactly ``num_bytes`` bytes."""
        data = bytearray(num_bytes)
        cursor = Cursor([data])
        while cursor:
            if not self.receive_some(cursor):
                self.await_data(deadline)
        return data

    def drain(self, num_bytes: int, deadline: float) -> None:
        """Read ``num_bytes`` bytes and forget them."""
        scratch = memoryview(bytearray(min(num_bytes, _SCRATCH_BYTES)))
        while num_bytes:
            cursor = Cursor([scratch[:num_bytes]])
            if not (got := self.receive_some(cursor)):
                self.await_data(deadline)
            num_bytes -= got

    def shutdown(self) -> None:
        """End every wait on the socket, here and at the peer. Any thread may call this."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the peer was faster, or the socket is closed already

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
