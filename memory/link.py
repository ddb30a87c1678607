"""The connection to one receiver, and the thread that owns it.

The thread connects, writes the frames of all streams in the order they were sent, pings every open stream several times
within its lease's time to live, reads the answers, and gives the receiver up when a stream is not answered for
``send_timeout_s``: then the connection is closed, which tells the receiver too, and every stream on it fails.
"""

import errno
import json
import logging
import select
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from memory.config import TransportConfig
from memory.frames import (
    HEADER_BYTES,
    NONCE_BYTES,
    Buffer,
    Cursor,
    FrameError,
    FrameSocket,
    Header,
    Kind,
    Waker,
    control,
    is_signed,
    session_key,
)
from memory.messages import LeaseGrant
from memory.stream import MAX_REASON_BYTES, Order, Stream
from memory.tls import TlsSocket

logger = logging.getLogger(__name__)

_IDLE_S = 60.0  # how long a wait lasts that ends early when something happens
_PINGS = 8  # per time to live and per send timeout
_READ_BYTES = 1 << 16


class Payloads(ABC):
    """What one link puts into frames. An object belongs to one thread."""

    @abstractmethod
    def hello(self) -> dict[str, Any]:
        """What the receiver must know of the sender's pool; JSON."""

    @abstractmethod
    def data(
        self, grant: LeaseGrant, layer_idx: int, pages: Sequence[int], ready: torch.cuda.Event | None
    ) -> tuple[Sequence[Buffer], int]:
        """Buffers of one layer of ``pages``, valid until the next call, and the checksum of their concatenation.

        What the receiver gets has ``grant.layout``.

        Raises ``ValueError`` if the pages hold what cannot be sent: the stream fails, others go on.
        """

    has_company = False  # whether a DATA frame's blocks follow it on another way

    def follow(self) -> None:  # noqa: B027 - nothing to do for most
        """A DATA frame was sent: send what goes beside it. Raises ``OSError`` if that is not possible in time."""

    def forget(self, lease_id: int) -> None:  # noqa: B027 - nothing to do for most
        """Nothing of this lease will be asked for any more."""

    def close(self) -> None:  # noqa: B027 - nothing to do for most
        """The link has ended."""


class Link(threading.Thread):
    """The connection to one receiver and the thread that owns it.

    Args:
        address: the receiver's, ``host:port``.
        config: timeouts and frame size.
        payloads: what frames carry.
        pages_per_frame: at most this many blocks go into one DATA frame.
        on_shipped: called with the number of pages after each DATA frame.
        tls: what the connection is secured with.
    """

    def __init__(
        self,
        address: str,
        config: TransportConfig,
        *,
        payloads: Payloads,
        pages_per_frame: int,
        on_shipped: Callable[[int], None],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(name="kv-link", daemon=True)
        self._address = address
        self._config = config
        self._payloads = payloads
        self._pages_per_frame = pages_per_frame
        self._on_shipped = on_shipped
        self._tls = tls
        self._orders: deque[Order] = deque()
        self._streams: dict[int, Stream] = {}  # by lease id; the thread's own
        self._waker = Waker()
        self._lock = threading.Lock()  # guards _closing, _dead and the waker's life
        self._closing = False
        self._dead = False
        self._channel: FrameSocket | None = None
        self._nonce = b""
        self._received = bytearray()  # answers not yet complete
        self._scratch = bytearray(_READ_BYTES)
        self._next_ping = float("inf")

    # Any thread.

    def put(self, order: Order) -> bool:
        """Queue an order; false, and nothing done, if the link has ended (its streams have failed then)."""
        with self._lock:
            if self._dead:
                return False
            self._orders.append(order)
            self._waker.set()
        return True

    def close(self) -> None:
        """End the thread soon; ``join`` waits for it."""
        with self._lock:
            if self._dead:
                return
            self._closing = True
            self._waker.set()
            if self._channel:
                self._channel.shutdown()

    # The link's thread.

    def run(self) -> None:
        """Connect and serve orders until an error or ``close``."""
        reason = "the transport failed, see the log"
        try:
            self._serve()
            reason = "the sender is closed"
        except (OSError, FrameError) as error:
            reason = "the sender is closed" if self._closing else f"receiver {self._address}: {error}"
        except Exception:
            logger.exception("link to %s", self._address)  # a defect; the streams must fail all the same
        finally:
            self._retire(reason)

    def _serve(self) -> None:
        channel = self._connect()
        while not self._closing:
            now = time.monotonic()
            if self._orders:
                self._send_order(self._orders.popleft())
                self._read_answers()
            elif channel.wait(select.POLLIN, self._next_ping if self._streams else now + _IDLE_S):
                self._read_answers()
            if self._streams and now >= self._next_ping:
                self._ping(now)

    def _connect(self) -> FrameSocket:
        """Connect and read the receiver's nonce."""
        deadline = time.monotonic() + self._config.connect_timeout_s
        host, _, port = self._address.rpartition(":")
        family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        channel = (
            TlsSocket(sock, self._waker, context=self._tls, server_side=False)
            if self._tls
            else FrameSocket(sock, self._waker)
        )
        with self._lock:
            self._channel = channel
        self._await_connection(channel, sock, where, deadline)
        channel.secure(deadline)
        raw = self._await(channel, HEADER_BYTES, deadline)
        header = Header.unpack(raw, is_answer=True)
        if header.kind != Kind.WELCOME:
            raise FrameError(f"the receiver began with a frame of kind {header.kind}")
        if header.payload_bytes != NONCE_BYTES:
            raise FrameError(f"the receiver drew a nonce of {header.payload_bytes} bytes, not {NONCE_BYTES}")
        self._nonce = bytes(self._await(channel, header.payload_bytes, deadline))
        return channel

    def _await_connection(self, channel: FrameSocket, sock: socket.socket, where: Any, deadline: float) -> None:
        error = sock.connect_ex(where)
        while error == errno.EINPROGRESS:
            if channel.wait(select.POLLOUT, deadline):
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            elif self._closing or time.monotonic() >= deadline:
                raise TimeoutError(f"no connection within {self._config.connect_timeout_s:g} s")
        if error:
            raise ConnectionError(errno.errorcode.get(error, str(error)))

    def _await(self, channel: FrameSocket, num_bytes: int, deadline: float) -> bytearray:
        try:
            return channel.receive(num_bytes, deadline)
        except TimeoutError:
            raise TimeoutError(f"no welcome within {self._config.connect_timeout_s:g} s") from None

    def _send_order(self, order: Order) -> None:
        stream = order.stream
        if order.kind == Kind.HELLO:
            self._open(stream)
        elif order.kind == Kind.DATA:
            self._send_pages(order)
        elif order.kind == Kind.COMMIT and stream.is_open:
            self._send_control(stream, Kind.COMMIT, order.payload)
        elif order.kind == Kind.ABORT:
            self._send_control(stream, Kind.ABORT, order.payload)
            self._drop(stream.grant.lease_id)

    def _open(self, stream: Stream) -> None:
        now = time.monotonic()
        stream.key = session_key(stream.grant.key, self._nonce)
        stream.answer_by = now + self._config.send_timeout_s
        self._streams[stream.grant.lease_id] = stream
        self._next_ping = min(self._next_ping, now + self._ping_interval(stream))
        details = self._payloads.hello() | {"layout": stream.grant.layout.digest()}
        self._send_control(stream, Kind.HELLO, json.dumps(details).encode())

    def _send_pages(self, order: Order) -> None:
        grant = order.stream.grant
        if self._payloads.has_company:
            self._await_greeting(order.stream)
        for start in range(0, len(order.pages), self._pages_per_frame):
            if not order.stream.is_open or self._closing:
                return
            pages = order.pages[start : start + self._pages_per_frame]
            try:
                buffers, checksum = self._payloads.data(grant, order.layer_idx, pages, order.ready)
            except ValueError as error:
                self._give_up(order.stream, str(error))
                return
            header = Header(
                kind=Kind.DATA,
                lease_id=grant.lease_id,
                epoch=grant.epoch,
                layer_idx=order.layer_idx,
                first_slot=order.first_slot + start,
                num_pages=len(pages),
                payload_bytes=sum(map(len, buffers)),
                checksum=checksum,
            )
            self._send([header.pack(order.stream.key), *buffers])
            self._payloads.follow()
            self._on_shipped(len(pages))
            if (now := time.monotonic()) >= self._next_ping:
                self._read_answers()
                self._ping(now)

    def _await_greeting(self, stream: Stream) -> None:
        """Until the receiver has answered the stream's HELLO, either way."""
        assert self._channel is not None
        while stream.is_open and not stream.is_greeted and not self._closing:
            if time.monotonic() >= stream.answer_by:
                raise TimeoutError(f"no answer within {self._config.send_timeout_s:g} s")
            if self._channel.wait(select.POLLIN, stream.answer_by):
                self._read_answers()

    def _give_up(self, stream: Stream, reason: str) -> None:
        """End a stream whose pages cannot be sent, here and at the receiver."""
        self._send_control(stream, Kind.ABORT, reason.encode()[:MAX_REASON_BYTES])
        self._drop(stream.grant.lease_id)
        stream.finish(reason)

    def _drop(self, lease_id: int) -> None:
        """Nothing of this lease is of interest any more."""
        self._streams.pop(lease_id, None)
        self._payloads.forget(lease_id)

    def _send_control(self, stream: Stream, kind: Kind, payload: bytes = b"") -> None:
        self._send(control(kind, stream.grant.lease_id, stream.grant.epoch, payload, key=stream.key))

    def _send(self, buffers: Sequence[Buffer]) -> None:
        assert self._channel is not None
        self._channel.send(buffers, time.monotonic() + self._config.send_timeout_s, on_readable=self._read_answers)

    def _ping_interval(self, stream: Stream) -> float:
        return min(stream.grant.ttl_s, self._config.send_timeout_s) / _PINGS

    def _ping(self, now: float) -> None:
        """Keep every open stream's lease alive; raise ``TimeoutError`` if one was not answered in time."""
        for stream in list(self._streams.values()):
            if stream.is_open and now > stream.answer_by:
                raise TimeoutError(f"no answer within {self._config.send_timeout_s:g} s")
            if stream.is_open:
                self._send_control(stream, Kind.PING)
        for lease_id in [lease_id for lease_id, stream in self._streams.items() if not stream.is_open]:
            self._drop(lease_id)
        intervals = [self._ping_interval(stream) for stream in self._streams.values()]
        self._next_ping = now + min(intervals, default=float("inf"))

    def _read_answers(self) -> None:
        """Take in what the receiver has said, without waiting."""
        assert self._channel is not None
        num_bytes = self._channel.receive_some(Cursor([self._scratch]))
        self._received += memoryview(self._scratch)[:num_bytes]
        while len(self._received) >= HEADER_BYTES:
            header = Header.unpack(self._received, is_answer=True)
            end = HEADER_BYTES + header.payload_bytes
            if len(self._received) < end:
                return
            frame = bytes(self._received[:end])
            del self._received[:end]
            self._take_answer(header, frame)

    def _take_answer(self, header: Header, frame: bytes) -> None:
        stream = self._streams.get(header.lease_id)
        if stream is None or header.epoch != stream.grant.epoch:
            return
        if header.kind == Kind.NACK:
            self._drop(header.lease_id)
            stream.finish(f"receiver {self._address} refused: {frame[HEADER_BYTES:].decode(errors='replace')}")
        elif not is_signed(frame, stream.key):
            raise FrameError(f"an answer for lease {header.lease_id} is not signed with its key")
        elif header.kind == Kind.ACK:
            self._drop(header.lease_id)
            stream.finish()
        else:
            stream.is_greeted = True
            stream.answer_by = time.monotonic() + self._config.send_timeout_s

    def _retire(self, reason: str) -> None:
        """Refuse further orders and fail every stream that still waits for something."""
        with self._lock:
            self._dead = True
            if self._channel:
                self._channel.close()
            self._waker.close()
        self._payloads.close()
        for stream in [*self._streams.values(), *(order.stream for order in self._orders)]:
            stream.finish(reason)
        self._streams.clear()
        self._orders.clear()
