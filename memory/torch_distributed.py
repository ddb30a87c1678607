"""KV through a torch.distributed group of two for each connection: gloo between hosts' memories, NCCL between GPUs.

The protocol is that of ``tcp``, on a TCP connection of its own; a DATA frame holds the checksum of the blocks only,
and they follow as one message in the group. The receiver takes each message into a buffer, also one of a lease that
has ended, and copies it to the pages if the lease still lives: what torch writes late, it does not write to pages.

The sender keeps a TCPStore where the two meet, under a name of their own that HELLO tells. Neither the store nor gloo
knows a key: who reaches the sender's ports can disturb a transfer, and the checksum in the signed frame finds that.

NCCL is written from torch's documentation and has not been run: the GPUs of sender and receiver must differ.
"""

import datetime
import itertools
import secrets
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from memory.config import TransportConfig
from memory.frames import Buffer, Header, Kind, checksum
from memory.leases import Lease, LeaseError, LeaseTable, Session
from memory.link import Payloads
from memory.messages import LeaseGrant
from memory.node_address import node_address
from memory.pages import PagePool
from memory.peer import Peer
from memory.receiver import StreamReceiver
from memory.sender import StreamSender
from memory.tensor_blocks import TensorBlocks, digest
from memory.transport import Transport
from parallel.carrier import ExchangeError, Message, finish
from parallel.gloo_group import GlooGroup, open_meeting

_CHECKSUM = struct.Struct("<Q")
_SENDER, _RECEIVER = 0, 1  # ranks
_POLL_S = 5e-5


class Pair(ABC):
    """One end of a group of two. Methods raise ``ConnectionError`` if the other end is lost or late."""

    @abstractmethod
    def send(self, message: torch.Tensor) -> None:
        """Send uint8 ``[num_bytes]``; it may be written to when this returns."""

    @abstractmethod
    def receive(self, message: torch.Tensor) -> None:
        """Fill uint8 ``[num_bytes]``."""

    @abstractmethod
    def close(self) -> None:
        """Leave."""


class GlooPair(Pair):
    """Between hosts' memories."""

    def __init__(self, rank: int, store: Store, config: TransportConfig) -> None:
        address = config.host or node_address()
        try:
            self._group = GlooGroup(rank, 2, meeting=store, address=address, timeout_s=config.connect_timeout_s)
        except ExchangeError as error:
            raise TimeoutError(f"no answer within {config.connect_timeout_s:g} s: {error}") from error
        self._rank, self._timeout_s = rank, config.send_timeout_s

    def send(self, message: torch.Tensor) -> None:
        self._exchange([Message(message, 1 - self._rank, 0)], [])

    def receive(self, message: torch.Tensor) -> None:
        self._exchange([], [Message(message, 1 - self._rank, 0)])

    def close(self) -> None:
        self._group.close()

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        try:
            sent, received = self._group.post(sends, receives)
            finish([*sent, *received], self._rank, self._timeout_s)
        except ExchangeError as error:
            raise ConnectionError(str(error)) from error


class NcclPair(Pair):
    """Between GPUs. Messages run on a stream of their own; a call returns when its message has arrived."""

    def __init__(self, rank: int, store: Store, config: TransportConfig, device: torch.device) -> None:
        self._rank, self._timeout_s, self._device = rank, config.send_timeout_s, device
        self._stream = torch.cuda.Stream(device)
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = datetime.timedelta(seconds=config.send_timeout_s)
        with torch.cuda.device(device):
            self._group: Any = nccl(store, rank, 2, options)

    def send(self, message: torch.Tensor) -> None:
        self._run(lambda: self._group.send([message], 1 - self._rank, 0))

    def receive(self, message: torch.Tensor) -> None:
        self._run(lambda: self._group.recv([message], 1 - self._rank, 0))

    def close(self) -> None:
        self._group.abort()

    def _run(self, start: Callable[[], Any]) -> None:
        deadline = time.monotonic() + self._timeout_s
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            work = start()
            work.wait()  # the stream waits, the process does not
            done = self._stream.record_event()
        while not done.query():
            if time.monotonic() >= deadline:
                self._group.abort()
                raise ConnectionError(f"NCCL moved nothing within {self._timeout_s:g} s")
            time.sleep(_POLL_S)


def open_pair(rank: int, store: Store, config: TransportConfig, device: torch.device) -> Pair:
    """The end of ``rank``; waits for the other one. Raises ``ConnectionError``."""
    return NcclPair(rank, store, config, device) if device.type == "cuda" else GlooPair(rank, store, config)


class GroupPayloads(Payloads):
    """Frames that hold checksums, and messages that hold the blocks."""

    has_company = True

    def __init__(self, pool: PagePool, config: TransportConfig, store: TCPStore, name: str) -> None:
        self._pool, self._config, self._store, self._name = pool, config, store, name
        self._blocks = TensorBlocks(pool)
        self._message: torch.Tensor | None = None
        self._pair: Pair | None = None

    def hello(self) -> dict[str, Any]:
        return {
            "layout": self._pool.layout.digest(),
            "device": self._pool.storage.device.type,
            "meeting": [self._config.host or node_address(), self._store.port, self._name],
        }

    def data(
        self, grant: LeaseGrant, layer_idx: int, pages: Sequence[int], ready: torch.cuda.Event | None
    ) -> tuple[Sequence[Buffer], int]:
        self._message = self._blocks.gather(layer_idx, pages, ready)
        payload = _CHECKSUM.pack(digest(self._message))
        return [payload], checksum([payload])

    def follow(self) -> None:
        assert self._message is not None
        if self._pair is None:
            store = PrefixStore(self._name, self._store)
            self._pair = open_pair(_SENDER, store, self._config, self._pool.storage.device)
        self._pair.send(self._message)

    def close(self) -> None:
        if self._pair:
            self._pair.close()
            self._pair = None


class GroupPeer(Peer):
    """Takes what follows each DATA frame in the group."""

    def __init__(
        self, sock: socket.socket, leases: LeaseTable, *, pool: PagePool, config: TransportConfig, **options: Any
    ) -> None:
        super().__init__(sock, leases, pool=pool, config=config, **options)
        self._staged = TensorBlocks(pool)
        self._meeting: tuple[str, int, str] | None = None
        self._pair: Pair | None = None

    def _fits(self, header: Header) -> bool:
        return header.payload_bytes == _CHECKSUM.size

    def _greet(self, lease: Lease, details: dict[str, Any]) -> None:
        super()._greet(lease, details)
        theirs, ours = details.get("device"), self._pool.storage.device.type
        if theirs != ours:
            raise LeaseError(f"the sender's pages are in {theirs} memory, the receiver's in {ours}: use transport=tcp")
        match details.get("meeting"):
            case [str(host), int(port), str(name)] if 0 < port < 1 << 16 and self._meeting in (
                None,
                (host, port, name),
            ):
                self._meeting = host, port, name
            case other:
                raise LeaseError(f"HELLO names no meeting, or another one than before: {other}")

    def _place(self, session: Session, header: Header, pages: Sequence[int], deadline: float) -> bool:
        payload = self._channel.receive(header.payload_bytes, deadline)
        blocks = self._take(len(pages))
        if checksum([payload]) != header.checksum or digest(blocks) != _CHECKSUM.unpack(payload)[0]:
            return False
        with session.lock:
            if session.lease.live:
                self._staged.scatter(header.layer_idx, pages, blocks)
        return True

    def _skip(self, header: Header, deadline: float) -> None:
        super()._skip(header, deadline)
        if header.kind == Kind.DATA and self._meeting:  # or the sender would wait for somebody to take its message
            self._take(header.num_pages)

    def _take(self, num_pages: int) -> torch.Tensor:
        """The next message."""
        assert self._meeting is not None  # a lease was opened here
        blocks = self._staged.buffer(num_pages)
        if self._pair is None:
            host, port, name = self._meeting
            timeout = datetime.timedelta(seconds=self._config.connect_timeout_s)
            try:
                store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
            except RuntimeError as error:
                raise ConnectionError(f"no store at {host}:{port}: {str(error).splitlines()[0]}") from error
            device = self._pool.storage.device
            self._pair = open_pair(_RECEIVER, PrefixStore(name, store), self._config, device)
        self._pair.receive(blocks)
        return blocks

    def _leave(self) -> None:
        if self._pair:
            self._pair.close()
            self._pair = None


class TorchDistributedReceiver(StreamReceiver):
    """Receives from senders whose pages are in memory of the same kind."""

    name = "torch_distributed"
    peer_class = GroupPeer


class TorchDistributedSender(StreamSender):
    """Sends messages in groups that meet at its store."""

    name = "torch_distributed"

    def __init__(self, pool: PagePool, config: TransportConfig) -> None:
        super().__init__(pool, config)
        self._store = open_meeting(config.host or node_address(), timeout_s=config.connect_timeout_s)
        self._numbers = itertools.count()

    def _make_payloads(self) -> Payloads:
        name = f"{next(self._numbers)}-{secrets.token_hex(8)}"
        return GroupPayloads(self._pool, self._config, self._store, name)


class TorchDistributedTransport(Transport):
    """The ``torch_distributed`` transport."""

    receiver, sender = TorchDistributedReceiver, TorchDistributedSender
