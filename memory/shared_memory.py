"""KV on one host: the receiver copies the blocks out of the sender's pool, which lies in a shared-memory segment.

The protocol is that of ``tcp`` over the loopback interface, but a DATA frame only says which of the sender's pages to
copy, and their checksum. The checksum costs a few percent of the copy (xxh3 reads faster than memory delivers) and is
what finds a page that the sender reused before the copy was made. A sender that dies leaves its pages mapped here; the
lease fails as with any lost connection. GPU pools cannot send this way.
"""

import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from memory.config import TransportConfig
from memory.frames import Buffer, Header, checksum
from memory.layout import KVLayout
from memory.leases import Lease, LeaseError, LeaseTable, Session
from memory.link import Payloads
from memory.pages import PagePool
from memory.peer import Peer
from memory.receiver import StreamReceiver
from memory.segment import SegmentPool, attach
from memory.sender import StreamSender
from memory.staging import HostBlocks
from memory.transport import KVReceiver, KVSender, Transport

_CHECKSUM = struct.Struct("<Q")  # of the blocks; the page ids follow, one uint32 each
_LOOPBACK = "127.0.0.1"


class CopyPeer(Peer):
    """Copies blocks out of the segment of the sender it is connected to."""

    def __init__(self, sock: socket.socket, leases: LeaseTable, *, pool: PagePool, config: TransportConfig) -> None:
        super().__init__(sock, leases, pool=pool, config=config)
        self._source_name = ""
        self._source: np.ndarray | None = None  # the sender's pages

    def _expected_payload(self, num_pages: int) -> int:
        return _CHECKSUM.size + 4 * num_pages

    def _greet(self, lease: Lease, details: dict[str, Any]) -> None:
        super()._greet(lease, details)
        name, num_pages = details.get("segment"), details.get("num_pages")
        if not isinstance(name, str) or not isinstance(num_pages, int) or num_pages < 1:
            raise LeaseError("HELLO names no segment")
        if self._source is None:
            layout = self._pool.layout
            try:
                self._source = attach(name, (layout.num_layers, num_pages, layout.block_bytes))
            except (OSError, ValueError) as error:
                raise LeaseError(f"the sender's segment cannot be used: {error}") from error
            self._source_name = name
        if name != self._source_name:
            raise LeaseError(f"this connection's segment is {self._source_name}, not {name}")

    def _fill(self, session: Session, header: Header, targets: Sequence[memoryview], deadline: float) -> int:
        payload = self._channel.receive(header.payload_bytes, deadline)
        if checksum([payload]) != header.checksum:
            raise LeaseError("a descriptor does not match its checksum")
        source = self._source
        assert source is not None  # the lease was opened on this connection
        pages = np.frombuffer(payload, dtype="<u4", offset=_CHECKSUM.size)
        if pages.max() >= source.shape[1]:
            raise LeaseError(f"page {pages.max()} is not in the sender's segment, which has {source.shape[1]}")
        with session.lock:
            if session.lease.live:
                _copy(source[header.layer_idx], pages.tolist(), targets)
        return _CHECKSUM.unpack_from(payload)[0]


class SharedMemoryReceiver(StreamReceiver):
    """Receives from senders on this host only."""

    name = "shared_memory"
    peer_class = CopyPeer

    def __init__(
        self,
        pool: PagePool,
        config: TransportConfig,
        *,
        on_commit: Callable[[str, bytes], None],
        on_failed: Callable[[str, str], None],
    ) -> None:
        super().__init__(pool, config, on_commit=on_commit, on_failed=on_failed, host=_LOOPBACK)


class DescriptorPayloads(Payloads):
    """Frames that say where the blocks are."""

    def __init__(self, pool: SegmentPool) -> None:
        self._pool = pool
        self._blocks = HostBlocks(pool)

    def hello(self) -> dict[str, Any]:
        return {
            "layout": self._pool.layout.digest(),
            "segment": self._pool.segment_name,
            "num_pages": self._pool.num_pages,
        }

    def data(
        self, layer_idx: int, pages: Sequence[int], ready: torch.cuda.Event | None
    ) -> tuple[Sequence[Buffer], int]:
        blocks = checksum(self._blocks.gather(layer_idx, pages))
        payload = _CHECKSUM.pack(blocks) + np.asarray(pages, dtype="<u4").tobytes()
        return [payload], checksum([payload])


class SharedMemorySender(StreamSender):
    """Sends descriptors of blocks in a ``SegmentPool``; closing it removes the segment's name."""

    name = "shared_memory"

    def __init__(self, pool: PagePool, config: TransportConfig) -> None:
        if not isinstance(pool, SegmentPool):
            raise TypeError("transport.name=shared_memory sends only from the pool that its allocate() made")
        self._segment_pool = pool
        super().__init__(pool, config)

    def _make_payloads(self) -> Payloads:
        return DescriptorPayloads(self._segment_pool)

    def close(self) -> None:
        super().close()
        self._segment_pool.close()


class SharedMemoryTransport(Transport):
    """The ``shared_memory`` transport."""

    @staticmethod
    def allocate(layout: KVLayout, num_pages: int) -> PagePool:
        return SegmentPool(layout, num_pages)

    @staticmethod
    def make_receiver(
        pool: PagePool,
        config: TransportConfig,
        *,
        on_commit: Callable[[str, bytes], None],
        on_failed: Callable[[str, str], None],
    ) -> KVReceiver:
        return SharedMemoryReceiver(pool, config, on_commit=on_commit, on_failed=on_failed)

    @staticmethod
    def make_sender(pool: PagePool, config: TransportConfig) -> KVSender:
        return SharedMemorySender(pool, config)


def _copy(source: np.ndarray, pages: Sequence[int], targets: Sequence[memoryview]) -> None:
    """Copy ``pages`` of uint8 ``[num_pages, block_bytes]`` in order into the targets, in few large copies."""
    block_bytes = source.shape[1]
    target_ends = np.cumsum([len(target) // block_bytes for target in targets]).tolist()
    start = 0
    for target, target_end in zip(targets, target_ends, strict=True):
        rows = np.frombuffer(target, dtype=np.uint8).reshape(-1, block_bytes)
        target_start = start
        while start < target_end:
            end = start + 1
            while end < target_end and pages[end] == pages[end - 1] + 1:
                end += 1
            blocks = source[pages[start] : pages[start] + end - start]
            np.copyto(rows[start - target_start : end - target_start], blocks)
            start = end
