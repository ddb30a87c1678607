"""KV on one host: the receiver copies the blocks out of the sender's pool, which lies in a shared-memory segment.

The protocol is that of ``tcp`` over the loopback interface, but a DATA frame only says which of the sender's pages to
copy, and their checksum. The checksum costs a few percent of the copy (xxh3 reads faster than memory delivers) and is
what finds a page that the sender reused before the copy was made. A sender that dies leaves its pages mapped here; the
lease fails as with any lost connection. GPU pools cannot send this way.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from memory.config import TransportConfig
from memory.descriptors import DescriptorPayloads, DescriptorPeer
from memory.frames import Header
from memory.leases import Lease, LeaseError, Session
from memory.link import Payloads
from memory.pages import PagePool
from memory.peer import FillingPeer
from memory.receiver import StreamReceiver
from memory.segment import SegmentPool, attach
from memory.sender import StreamSender
from memory.transport import Transport

_LOOPBACK = "127.0.0.1"


class CopyPeer(DescriptorPeer, FillingPeer):
    """Copies blocks out of the segment of the sender it is connected to."""

    _source: np.ndarray | None = None  # the sender's pages
    _source_name = ""

    def _greet(self, lease: Lease, details: dict[str, Any]) -> None:
        super()._greet(lease, details)
        name = details.get("segment")
        if not isinstance(name, str):
            raise LeaseError("HELLO names no segment")
        if self._source is None:
            layout = self._pool.layout
            try:
                self._source = attach(name, (layout.num_layers, self._num_pages, layout.block_bytes))
            except (OSError, ValueError) as error:
                raise LeaseError(f"the sender's segment cannot be used: {error}") from error
            self._source_name = name
        if name != self._source_name:
            raise LeaseError(f"this connection's segment is {self._source_name}, not {name}")

    def _fill(self, session: Session, header: Header, targets: Sequence[memoryview], deadline: float) -> int:
        expected, pages = self._read_descriptor(header, deadline)
        assert self._source is not None  # the lease was opened on this connection
        with session.lock:
            if session.lease.live:
                _copy(self._source[header.layer_idx], pages.tolist(), targets)
        return expected


class SharedMemoryReceiver(StreamReceiver):
    """Receives from senders on this host only."""

    name = "shared_memory"
    peer_class = CopyPeer

    host = "127.0.0.1"


class SegmentPayloads(DescriptorPayloads):
    """Frames that say where in the segment the blocks are."""

    def __init__(self, pool: SegmentPool) -> None:
        super().__init__(pool)
        self._segment_name = pool.segment_name

    def hello(self) -> dict[str, Any]:
        return super().hello() | {"segment": self._segment_name}


class SharedMemorySender(StreamSender):
    """Sends descriptors of blocks in a ``SegmentPool``; closing it removes the segment's name."""

    name = "shared_memory"

    def __init__(self, pool: PagePool, config: TransportConfig) -> None:
        if not isinstance(pool, SegmentPool):
            raise TypeError("transport.name=shared_memory sends only from the pool that its allocate() made")
        self._segment_pool = pool
        super().__init__(pool, config)

    def _make_payloads(self) -> Payloads:
        return SegmentPayloads(self._segment_pool)

    def close(self) -> None:
        super().close()
        self._segment_pool.close()


class SharedMemoryTransport(Transport):
    """The ``shared_memory`` transport."""

    receiver, sender = SharedMemoryReceiver, SharedMemorySender
    pool = SegmentPool


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
