"""A receiver and its senders to test transports with, and a client that sends whatever frames a test wants."""

import json
import queue
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace
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
NAMES = ("shared_memory", "tcp", "torch_distributed", *(["nixl"] if find_spec("nixl") else []))
FRAMED = ("shared_memory", "tcp")  # those of which a test can send single frames
WAIT_S = 10.0  # longer than anything here takes
CONFIG = TransportConfig(
    host="127.0.0.1", frame_bytes="16KiB", lease_ttl_s=5.0, connect_timeout_s=2.0, send_timeout_s=2.0
)


class Pair:
    """Both ends, their pools, and what they called back. One sender unless said otherwise."""

    def __init__(
        self,
        name: str,
        config: TransportConfig = CONFIG,
        *,
        layout: KVLayout = LAYOUT,
        num_pages: int = 32,
        num_senders: int = 1,
    ):
        transport = TRANSPORTS.get(name)
        self.events: queue.Queue[tuple[str, ...]] = queue.Queue()  # at the receiver
        self.answers_of: list[queue.Queue[tuple[str, ...]]] = [queue.Queue() for _ in range(num_senders)]
        self.sources = [transport.allocate(layout, num_pages) for _ in range(num_senders)]
        for source in self.sources:
            source.storage.random_(1, 256)
        self.target = PagePool(layout, num_pages)
        self.gate = threading.Event()  # the receiver's callbacks return once it is set
        self.gate.set()
        self.receiver = transport.make_receiver(
            self.target,
            config,
            on_commit=lambda request_id, payload: self._call_back("commit", request_id, payload.decode()),
            on_failed=lambda request_id, reason: self._call_back("failed", request_id, reason),
        )
        self.senders: list[StreamSender] = [transport.make_sender(source, config) for source in self.sources]
        self.source, self.sender, self.answers = self.sources[0], self.senders[0], self.answers_of[0]

    def grant(
        self,
        pages: Sequence[int],
        *,
        request_id: str = "r",
        first_page_idx: int = 0,
        page_idxs: Sequence[int] | None = None,
    ) -> LeaseGrant:
        """A lease on the receiver's ``pages`` for all senders; ``page_idxs`` if they do not follow each other."""
        if page_idxs is None:
            page_idxs = range(first_page_idx, first_page_idx + len(pages))
        num_tokens = (page_idxs[-1] + 1 if page_idxs else first_page_idx) * self.target.layout.page_size
        return self.receiver.grant(
            request_id, pages, page_idxs=page_idxs, num_tokens=num_tokens, num_senders=len(self.senders)
        )

    def open(self, grant: LeaseGrant, sender_idx: int = 0) -> KVStream:
        """A stream whose answers go to ``answers_of[sender_idx]``."""
        answers = self.answers_of[sender_idx]
        return self.senders[sender_idx].open(
            grant,
            on_acked=lambda: answers.put(("acked", grant.request_id)),
            on_failed=lambda reason: answers.put(("failed", grant.request_id, reason)),
        )

    def open_all(self, grant: LeaseGrant) -> list[KVStream]:
        """A stream of each sender."""
        return [self.open(grant, sender_idx) for sender_idx in range(len(self.senders))]

    def event(self) -> tuple[str, ...]:
        """The receiver's next callback."""
        return self.events.get(timeout=WAIT_S)

    def answer(self, sender_idx: int = 0) -> tuple[str, ...]:
        """The sender's next callback."""
        return self.answers_of[sender_idx].get(timeout=WAIT_S)

    def is_silent(self, seconds: float = 0.1) -> bool:
        """Whether nothing is called back for a while."""
        time.sleep(seconds)
        return self.events.empty() and all(answers.empty() for answers in self.answers_of)

    def arrived(self, *plans: tuple[Sequence[int], Sequence[int]]) -> bool:
        """Whether the target holds each sender's (source pages, target pages) and all its other bytes are untouched."""
        expected = torch.zeros_like(self.target.storage)
        for source, (source_pages, target_pages) in zip(self.sources, plans, strict=True):
            expected[:, list(target_pages)] = source.storage[:, list(source_pages)]
        return torch.equal(self.target.storage, expected)

    def is_untouched(self) -> bool:
        """Whether nothing was written to the target."""
        return not self.target.storage.any()

    def _call_back(self, *event: str) -> None:
        self.events.put(event)
        self.gate.wait(WAIT_S)

    def close(self) -> None:
        """Close both ends."""
        for sender in self.senders:
            sender.close()
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
        stream.send(layer_idx, range(len(pages)), pages)
    stream.commit(payload)


class RawSender:
    """A connection that speaks the protocol frame by frame, rightly or wrongly."""

    def __init__(self, pair: Pair, sender_idx: int = 0) -> None:
        host, _, port = pair.receiver.address.rpartition(":")
        self.payloads: Payloads = pair.senders[sender_idx]._make_payloads()
        self._grant: Any = SimpleNamespace(lease_id=0, layout=pair.sources[sender_idx].layout)
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
        buffers, digest = self.payloads.data(self._grant, layer_idx, pages, None)
        fields = {"layer_idx": layer_idx, "first_slot": first_slot, "num_pages": len(pages), "checksum": digest}
        return b"".join(bytes(buffer) for buffer in buffers), fields

    def open(self, grant: LeaseGrant) -> None:
        """Say HELLO; the lease is open when this returns."""
        self.send(Kind.HELLO, grant, json.dumps(self.payloads.hello()).encode())
        assert self.answer()[0] == Kind.PONG

    def pack_blocks(self, grant: LeaseGrant, layer_idx: int, first_slot: int, pages: Sequence[int]) -> bytes:
        """A right DATA frame."""
        payload, fields = self.data(layer_idx, first_slot, pages)
        return self.pack(Kind.DATA, grant, payload, **fields) + payload

    def send_bytes(self, data: bytes) -> None:
        """Anything."""
        self._channel.send([data], time.monotonic() + WAIT_S)

    def answer(self) -> tuple[int, bytes]:
        """Kind and payload of the receiver's next frame."""
        deadline = time.monotonic() + WAIT_S
        header = Header.unpack(self._channel.receive(HEADER_BYTES, deadline))
        return header.kind, bytes(self._channel.receive(header.payload_bytes, deadline))

    def is_silent(self, seconds: float = 0.1) -> bool:
        """Whether the receiver says nothing for a while."""
        return not self._channel.wait(select.POLLIN, time.monotonic() + seconds)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


@contextmanager
def make_raw(pair: Pair, sender_idx: int = 0) -> Iterator[RawSender]:
    """A raw sender with the pages of one of the pair's, that is closed afterwards."""
    raw = RawSender(pair, sender_idx)
    try:
        yield raw
    finally:
        raw.close()


@contextmanager
def make_raws(pair: Pair, grant: LeaseGrant) -> Iterator[list[RawSender]]:
    """For each of the pair's senders a raw one that has opened the grant."""
    with ExitStack() as stack:
        raws = [stack.enter_context(make_raw(pair, sender_idx)) for sender_idx in range(len(pair.senders))]
        for raw in raws:
            raw.open(grant)
        yield raws
