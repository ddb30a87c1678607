"""A receiver and a sender to test transports with, and a client that sends whatever frames a test wants."""

import queue
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from memory.config import TransportConfig
from memory.frames import HEADER_BYTES, FrameSocket, Header, Kind, checksum, session_key
from memory.layout import KVLayout
from memory.link import Payloads
from memory.messages import LeaseGrant
from memory.pages import PagePool
from memory.sender import StreamSender
from memory.transport import TRANSPORTS, KVStream

LAYOUT = KVLayout(3, 2, 16, 16, "float32", "hnd")  # blocks of 4 KiB
NAMES = tuple(TRANSPORTS)
WAIT_S = 10.0  # longer than anything here takes
CONFIG = TransportConfig(
    host="127.0.0.1", frame_bytes="16KiB", lease_ttl_s=5.0, connect_timeout_s=2.0, send_timeout_s=2.0
)


class Pair:
    """Both ends, their pools, and what they called back."""

    def __init__(self, name: str, config: TransportConfig = CONFIG, *, layout: KVLayout = LAYOUT, num_pages: int = 32):
        transport = TRANSPORTS.get(name)
        self.events: queue.Queue[tuple[str, ...]] = queue.Queue()  # at the receiver
        self.answers: queue.Queue[tuple[str, ...]] = queue.Queue()  # at the sender
        self.source = transport.allocate(layout, num_pages)
        self.source.storage.random_(1, 256)
        self.target = PagePool(layout, num_pages)
        self.receiver = transport.make_receiver(
            self.target,
            config,
            on_commit=lambda request_id, payload: self.events.put(("commit", request_id, payload.decode())),
            on_failed=lambda request_id, reason: self.events.put(("failed", request_id, reason)),
        )
        self.sender: StreamSender = transport.make_sender(self.source, config)

    def grant(self, pages: Sequence[int], *, request_id: str = "r", first_page_idx: int = 0) -> LeaseGrant:
        """A lease on the receiver's ``pages``."""
        num_tokens = (first_page_idx + len(pages)) * LAYOUT.page_size
        return self.receiver.grant(request_id, pages, first_page_idx=first_page_idx, num_tokens=num_tokens)

    def open(self, grant: LeaseGrant) -> KVStream:
        """A stream whose answers go to ``answers``."""
        return self.sender.open(
            grant,
            on_acked=lambda: self.answers.put(("acked", grant.request_id)),
            on_failed=lambda reason: self.answers.put(("failed", grant.request_id, reason)),
        )

    def event(self) -> tuple[str, ...]:
        """The receiver's next callback."""
        return self.events.get(timeout=WAIT_S)

    def answer(self) -> tuple[str, ...]:
        """The sender's next callback."""
        return self.answers.get(timeout=WAIT_S)

    def is_silent(self, seconds: float = 0.1) -> bool:
        """Whether nothing is called back for a while."""
        time.sleep(seconds)
        return self.events.empty() and self.answers.empty()

    def arrived(self, source_pages: Sequence[int], target_pages: Sequence[int]) -> bool:
        """Whether the target's pages equal the source's and every other byte of the target is untouched."""
        expected = torch.zeros_like(self.target.storage)
        expected[:, list(target_pages)] = self.source.storage[:, list(source_pages)]
        return torch.equal(self.target.storage, expected)

    def is_untouched(self) -> bool:
        """Whether nothing was written to the target."""
        return not self.target.storage.any()

    def close(self) -> None:
        """Close both ends."""
        self.sender.close()
        self.receiver.close()


@contextmanager
def make_pair(name: str, config: TransportConfig = CONFIG, **kwargs: Any) -> Iterator[Pair]:
    """A pair that is closed afterwards."""
    pair = Pair(name, config, **kwargs)
    try:
        yield pair
    finally:
        pair.close()


def ship(stream: KVStream, pages: Sequence[int], *, payload: bytes = b"") -> None:
    """Send every layer of the sequence's ``pages`` and commit."""
    for layer_idx in range(LAYOUT.num_layers):
        stream.send(layer_idx, 0, pages)
    stream.commit(payload)


class RawSender:
    """A connection that speaks the protocol frame by frame, rightly or wrongly."""

    def __init__(self, pair: Pair) -> None:
        host, _, port = pair.receiver.address.rpartition(":")
        self.payloads: Payloads = pair.sender._make_payloads()
        self._channel = FrameSocket(socket.create_connection((host, int(port)), timeout=WAIT_S))
        kind, self.nonce = self.answer()
        assert kind == Kind.WELCOME

    def send(self, kind: Kind, grant: LeaseGrant, payload: bytes = b"", **fields: int) -> None:
        """A frame signed with the grant's key; ``fields`` replace the header's."""
        self.send_bytes(self.pack(kind, grant, payload, **fields) + payload)

    def pack(self, kind: Kind, grant: LeaseGrant, payload: bytes = b"", **fields: int) -> bytes:
        """The header of such a frame."""
        header = Header(kind, grant.lease_id, grant.epoch, payload_bytes=len(payload), checksum=checksum([payload]))
        return replace(header, **fields).pack(session_key(grant.key, self.nonce))

    def data(self, layer_idx: int, first_slot: int, pages: Sequence[int]) -> tuple[bytes, dict[str, int]]:
        """Payload and header fields of a right DATA frame."""
        buffers, digest = self.payloads.data(layer_idx, pages, None)
        fields = {"layer_idx": layer_idx, "first_slot": first_slot, "num_pages": len(pages), "checksum": digest}
        return b"".join(bytes(buffer) for buffer in buffers), fields

    def send_bytes(self, data: bytes) -> None:
        """Anything."""
        self._channel.send([data], time.monotonic() + WAIT_S)

    def answer(self) -> tuple[int, bytes]:
        """Kind and payload of the receiver's next frame."""
        deadline = time.monotonic() + WAIT_S
        header = Header.unpack(self._channel.receive(HEADER_BYTES, deadline))
        return header.kind, bytes(self._channel.receive(header.payload_bytes, deadline))

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


@contextmanager
def make_raw(pair: Pair) -> Iterator[RawSender]:
    """A raw sender that is closed afterwards."""
    raw = RawSender(pair)
    try:
        yield raw
    finally:
        raw.close()
