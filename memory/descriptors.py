"""DATA frames that say where the sender's blocks are, for transports whose receiver fetches them.

The payload is the checksum of the blocks and the sender's page ids, one uint32 each. The checksum is what finds a page
that the sender reused before it was fetched.
"""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from memory.frames import Buffer, Header, checksum
from memory.leases import Lease, LeaseError
from memory.link import Payloads
from memory.messages import LeaseGrant
from memory.pages import PagePool
from memory.peer import Peer
from memory.tensor_blocks import digest_pages

CHECKSUM = struct.Struct("<Q")
_MAX_PAGES = 1 << 32  # that frames can name


class DescriptorPayloads(Payloads):
    """Frames that say where the blocks are."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._digest = digest_pages(pool)

    def hello(self) -> dict[str, Any]:
        return {"layout": self._pool.layout.digest(), "num_pages": self._pool.num_pages}

    def data(
        self, grant: LeaseGrant, layer_idx: int, pages: Sequence[int], ready: torch.cuda.Event | None
    ) -> tuple[Sequence[Buffer], int]:
        payload = CHECKSUM.pack(self._digest(layer_idx, pages, ready)) + np.asarray(pages, dtype="<u4").tobytes()
        return [payload], checksum([payload])


class DescriptorPeer(Peer):
    """Reads such frames."""

    _num_pages = 0  # of the sender's pool

    def _fits(self, header: Header) -> bool:
        return header.payload_bytes == CHECKSUM.size + 4 * header.num_pages

    def _greet(self, lease: Lease, details: dict[str, Any]) -> None:
        super()._greet(lease, details)
        num_pages = details.get("num_pages")
        if not isinstance(num_pages, int) or not 1 <= num_pages <= _MAX_PAGES:
            raise LeaseError("HELLO does not say how many pages the sender has")
        if self._num_pages not in (0, num_pages):
            raise LeaseError(f"this connection's sender has {self._num_pages} pages, not {num_pages}")
        self._num_pages = num_pages

    def _read_descriptor(self, header: Header, deadline: float) -> tuple[int, np.ndarray]:
        """The blocks' checksum, and where they are; raises ``LeaseError`` if the frame is not right."""
        payload = self._channel.receive(header.payload_bytes, deadline)
        if checksum([payload]) != header.checksum:
            raise LeaseError("a descriptor does not match its checksum")
        pages = np.frombuffer(payload, dtype="<u4", offset=CHECKSUM.size)
        if pages.max() >= self._num_pages:
            raise LeaseError(f"page {pages.max()} is not in the sender's pool, which has {self._num_pages}")
        return CHECKSUM.unpack_from(payload)[0], pages
