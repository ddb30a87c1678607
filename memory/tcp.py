"""KV over TCP: a DATA frame's payload is the blocks themselves.

The sender hands its pages to the kernel as they lie in the pool, the receiver has them written where they belong; on
neither side is there a copy in between (GPU pools: one pinned buffer). Any network; workers come and go freely.
"""

from collections.abc import Sequence
from typing import Any

import torch

from memory.codecs import Codec, CodecError, concatenate, make_codec
from memory.config import TransportConfig
from memory.convert import convert
from memory.frames import Buffer, Cursor, Header, checksum
from memory.layout import KVLayout
from memory.leases import Lease, LeaseError, Session
from memory.link import Payloads
from memory.messages import LeaseGrant
from memory.pages import PagePool
from memory.peer import FillingPeer
from memory.receiver import StreamReceiver
from memory.sender import StreamSender
from memory.staging import make_blocks
from memory.tls import make_context
from memory.transport import Transport


class BlockPeer(FillingPeer):
    """Has blocks written out of the socket straight into the pages, or by way of a codec."""

    _codec: Codec | None = None  # the connection's

    def _greet(self, lease: Lease, details: dict[str, Any]) -> None:
        super()._greet(lease, details)
        name = str(details.get("codec", "none"))
        if self._codec is None or self._codec.name != name:
            try:
                self._codec = make_codec(name, self._pool.layout)
            except ValueError as error:
                raise LeaseError(f"the sender's codec cannot be used: {error}") from None

    def _fits(self, header: Header) -> bool:
        if self._codec is None:
            return super()._fits(header)
        return header.payload_bytes <= self._codec.limit(header.num_pages * self._pool.layout.block_bytes)

    def _place(self, session: Session, header: Header, pages: Sequence[int], deadline: float) -> bool:
        if self._codec is None:
            return super()._place(session, header, pages, deadline)
        payload = self._channel.receive(header.payload_bytes, deadline)
        if checksum([payload]) != header.checksum:
            return False
        try:
            blocks = self._codec.decode(payload, len(pages) * self._pool.layout.block_bytes)
        except CodecError as error:
            raise LeaseError(str(error)) from None
        self._put(session, header, pages, blocks)
        return True

    def _fill(self, session: Session, header: Header, targets: Sequence[memoryview], deadline: float) -> int:
        cursor = Cursor(targets)
        while cursor:
            with session.lock:
                if not session.lease.live:
                    break
                got = self._channel.receive_some(cursor)
            if not got:
                self._channel.await_data(deadline)
        self._channel.drain(cursor.remaining, deadline)
        return header.checksum


class TcpReceiver(StreamReceiver):
    """Receives from any host that reaches ``config.host``, or else this node's address."""

    name = "tcp"
    peer_class = BlockPeer

    def _prepare(self) -> None:
        make_codec(self._config.codec, self._pool.layout)  # its own refusal, before anything is sent
        self._tls = make_context(self._config, server_side=True)


class BlockPayloads(Payloads):
    """Frames that carry the blocks: as they are, in the receiver's layout, as a codec makes them."""

    def __init__(self, pool: PagePool, codec: str) -> None:
        self._layout = pool.layout
        self._blocks = make_blocks(pool)
        self._codec_name = codec
        self._codec: Codec | None = None  # for the layout that was sent last

    def hello(self) -> dict[str, Any]:
        return {"layout": self._layout.digest(), "codec": self._codec_name}

    def data(
        self, grant: LeaseGrant, layer_idx: int, pages: Sequence[int], ready: torch.cuda.Event | None
    ) -> tuple[Sequence[Buffer], int]:
        buffers: Sequence[Buffer] = self._blocks.gather(layer_idx, pages, ready)
        if grant.layout != self._layout:
            buffers = [convert(concatenate(buffers), self._layout, grant.layout).data]
        if codec := self._codec_for(grant.layout):
            buffers = [codec.encode(concatenate(buffers))]
        return buffers, checksum(buffers)

    def _codec_for(self, layout: KVLayout) -> Codec | None:
        if self._codec is None or self._codec.layout != layout:
            self._codec = make_codec(self._codec_name, layout)
        return self._codec


class TcpSender(StreamSender):
    """Sends blocks straight out of the pages, or what ``config.codec`` makes of them."""

    name = "tcp"
    converts = True

    def __init__(self, pool: PagePool, config: TransportConfig) -> None:
        self._tls = make_context(config, server_side=False)
        super().__init__(pool, config)

    def _make_payloads(self) -> Payloads:
        return BlockPayloads(self._pool, self._config.codec)


class TcpTransport(Transport):
    """The ``tcp`` transport."""

    receiver, sender = TcpReceiver, TcpSender
