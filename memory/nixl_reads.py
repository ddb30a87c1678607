"""KV over NIXL (the optional package ``nixl``): the receiver reads the blocks out of the sender's registered pool.

The protocol is that of ``tcp``, on a TCP connection of its own; a DATA frame says which of the sender's pages to read,
and their checksum. NIXL moves the bytes with whatever UCX finds between the two: RDMA, shared memory, TCP
(``UCX_TLS`` restricts it). The read ends in a buffer of the receiver's and is copied to the pages if the lease still
lives, so that no late write of a network card reaches a page.

NIXL itself never reports a frozen peer: reads have deadlines here. One that does not end in time ends the connection,
and its buffer is kept for good, since it may still be written. GPU pools are registered as they are; not run yet.
"""

import base64
import logging
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from memory.config import TransportConfig
from memory.descriptors import DescriptorPayloads, DescriptorPeer
from memory.frames import Buffer, Header
from memory.leases import Lease, LeaseError, LeaseTable, Session
from memory.link import Payloads
from memory.messages import LeaseGrant
from memory.pages import PagePool
from memory.peer import Peer
from memory.receiver import StreamReceiver
from memory.sender import StreamSender
from memory.tensor_blocks import TensorBlocks, digest
from memory.transport import Transport

logger = logging.getLogger(__name__)

_POLL_S = 5e-5
_BUSY_S = 0.05  # since the last frame: then reads are few
_QUIET_S = 1e-3
_abandoned: list[torch.Tensor] = []  # buffers that a read may still write to


class Agent:
    """This process's end of NIXL for one pool. Thread-safe.

    Raises ``RuntimeError`` if the package or its UCX backend is missing.
    """

    def __init__(self) -> None:
        try:
            from nixl._api import nixl_agent, nixl_agent_config  # optional, and slow to load
        except ImportError as error:
            raise RuntimeError(f"transport.name=nixl needs the package nixl (pip install nixl): {error}") from error
        logging.getLogger("nixl").setLevel(logging.WARNING)
        self._lock = threading.Lock()
        self._met: Counter[str] = Counter()  # connections by the agent that they lead to
        config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])  # NIXL's thread never sleeps
        self._agent: Any = nixl_agent(f"longctx-{secrets.token_hex(8)}", config)
        if "UCX" not in self._agent.backends:
            raise RuntimeError("transport.name=nixl needs NIXL's UCX backend, which this installation lacks")

    def register(self, memory: torch.Tensor) -> Any:
        """Make a tensor's memory known; returns what ``unregister`` takes."""
        with self._lock:
            return self._agent.register_memory(memory)

    def unregister(self, registered: Any) -> None:
        """Forget it."""
        with self._lock:
            self._agent.deregister_memory(registered)

    def introduce(self) -> bytes:
        """What another agent must know to read what is registered here."""
        with self._lock:
            return self._agent.get_agent_metadata()

    def meet(self, metadata: bytes) -> str:
        """Another agent's name, which can be read from then on."""
        with self._lock:
            name = self._agent.add_remote_agent(metadata)
            name = name.decode() if isinstance(name, bytes) else name
            self._met[name] += 1
        return name

    def part(self, name: str) -> None:
        """Forget another agent, unless another connection has met it too."""
        with self._lock:
            self._met[name] -= 1
            if not self._met[name]:
                del self._met[name]
                self._agent.remove_remote_agent(name)

    def read(self, name: str, pieces: Sequence[tuple[int, int]], device: tuple[int, int], target: torch.Tensor) -> Any:
        """Begin to read (address, bytes) pieces of an agent's memory, one after another, into ``target``.

        Args:
            name: the agent.
            pieces: in its memory.
            device: its GPU and ours, 0 for host memory.
            target: registered here, as large as the pieces together, memory of the same kind.
        """
        kind = "VRAM" if target.is_cuda else "DRAM"
        start, local = target.data_ptr(), []
        for _, size in pieces:
            local.append((start, size, device[1]))
            start += size
        with self._lock:
            ours = self._agent.get_xfer_descs(local, kind)
            theirs = self._agent.get_xfer_descs([(where, size, device[0]) for where, size in pieces], kind)
            handle = self._agent.initialize_xfer("READ", ours, theirs, name)
            self._agent.transfer(handle)
        return handle

    def progress(self) -> None:
        """Serve what others read here, as far as it has come."""
        with self._lock:
            self._agent.get_new_notifs()

    def state(self, handle: Any) -> str:
        """``PROC``, ``DONE`` or ``ERR``."""
        with self._lock:
            return self._agent.check_xfer_state(handle)

    def release(self, handle: Any) -> None:
        """A read has ended, or nobody waits for it any more."""
        with self._lock:
            handle.release()


class Progress(threading.Thread):
    """Lets UCX serve reads of a sender's pool while there are some to be expected; without RDMA nobody else does.

    Args:
        agent: the sender's.
    """

    def __init__(self, agent: Agent) -> None:
        super().__init__(name="nixl-progress", daemon=True)
        self._agent = agent
        self._reasons: set[object] = set()
        self._asked = 0.0  # time.monotonic() of the last ``begin``
        self._wake = threading.Event()
        self._closing = False

    def begin(self, reason: object) -> None:
        """Reads are to be expected until ``end``; any thread."""
        self._reasons.add(reason)
        self._asked = time.monotonic()
        self._wake.set()

    def end(self, reason: object) -> None:
        """None for this reason."""
        self._reasons.discard(reason)

    def close(self) -> None:
        """End the thread."""
        self._closing = True
        self._wake.set()
        self.join()

    def run(self) -> None:
        while not self._closing:
            self._wake.wait()
            self._wake.clear()
            while self._reasons and not self._closing:
                self._agent.progress()
                time.sleep(_POLL_S if time.monotonic() - self._asked < _BUSY_S else _QUIET_S)


class NixlPayloads(DescriptorPayloads):
    """Frames that say which pages of the registered pool to read."""

    def __init__(self, pool: PagePool, introduction: bytes, progress: Progress) -> None:
        super().__init__(pool)
        self._introduction, self._progress = introduction, progress
        self._leases: set[int] = set()

    def hello(self) -> dict[str, Any]:
        storage = self._pool.storage
        return super().hello() | {
            "agent": base64.b64encode(self._introduction).decode(),
            "address": storage.data_ptr(),
            "device": [storage.device.type, storage.device.index or 0],
        }

    def data(
        self, grant: LeaseGrant, layer_idx: int, pages: Sequence[int], ready: torch.cuda.Event | None
    ) -> tuple[Sequence[Buffer], int]:
        self._leases.add(grant.lease_id)
        self._progress.begin((self, grant.lease_id))
        return super().data(grant, layer_idx, pages, ready)

    def forget(self, lease_id: int) -> None:
        self._leases.discard(lease_id)
        self._progress.end((self, lease_id))

    def close(self) -> None:
        for lease_id in list(self._leases):
            self.forget(lease_id)


class NixlPeer(DescriptorPeer):
    """Reads blocks out of the pool of the sender it is connected to."""

    def __init__(
        self, sock: socket.socket, leases: LeaseTable, *, pool: PagePool, config: TransportConfig, agent: Agent
    ) -> None:
        super().__init__(sock, leases, pool=pool, config=config)
        self._agent = agent
        self._staged = TensorBlocks(pool)
        self._registered: tuple[torch.Tensor, Any] | None = None  # the buffer, and NIXL's name of it
        self._sender: tuple[str, int, int] | None = None  # its agent's name, its pool's address and GPU

    def _greet(self, lease: Lease, details: dict[str, Any]) -> None:
        super()._greet(lease, details)
        match details:
            case {"agent": str(agent), "address": int(address), "device": [str(kind), int(device)]}:
                pass
            case _:
                raise LeaseError("HELLO names no NIXL agent")
        if kind != self._pool.storage.device.type:
            raise LeaseError(f"the sender's pages are in {kind} memory, the receiver's are not: use transport=tcp")
        if self._sender is None:
            try:
                self._sender = self._agent.meet(base64.b64decode(agent, validate=True)), address, device
            except Exception as error:  # NIXL has exceptions of its own, all of which mean this
                raise LeaseError(f"the sender's NIXL agent cannot be used: {error}") from error

    def _place(self, session: Session, header: Header, pages: Sequence[int], deadline: float) -> bool:
        expected, source_pages = self._read_descriptor(header, deadline)
        buffer = self._buffer(len(pages))
        self._read(header.layer_idx, source_pages, buffer, deadline)
        if digest(buffer) != expected:
            return False
        with session.lock:
            if session.lease.live:
                self._staged.scatter(header.layer_idx, pages, buffer)
        return True

    def _buffer(self, num_pages: int) -> torch.Tensor:
        """A registered buffer for so many pages."""
        buffer = self._staged.buffer(num_pages)
        if self._registered is None or self._registered[0].data_ptr() != buffer.data_ptr():
            self._unregister()
            whole = torch.empty(0, dtype=torch.uint8, device=buffer.device).set_(buffer.untyped_storage())
            self._registered = whole, self._agent.register(whole)
        return buffer

    def _read(self, layer_idx: int, pages: np.ndarray, buffer: torch.Tensor, deadline: float) -> None:
        """Raises ``ConnectionError`` if the blocks do not come in time."""
        assert self._sender is not None
        name, address, device = self._sender
        size = self._pool.layout.block_bytes
        base = address + layer_idx * self._num_pages * size
        ends = [*(np.flatnonzero(np.diff(pages) != 1) + 1).tolist(), len(pages)]
        starts = [0, *ends[:-1]]
        pieces = [
            (base + int(pages[start]) * size, (end - start) * size) for start, end in zip(starts, ends, strict=True)
        ]
        try:
            handle = self._agent.read(name, pieces, (device, buffer.device.index or 0), buffer)
            while (state := self._agent.state(handle)) == "PROC" and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        except Exception as error:  # NIXL's own
            raise ConnectionError(f"NIXL cannot read the sender's pages: {error}") from error
        if state == "PROC":
            _abandoned.append(buffer)
            self._registered = None
            raise ConnectionError("NIXL did not read the sender's pages in time")
        self._agent.release(handle)
        if state != "DONE":
            raise ConnectionError(f"NIXL cannot read the sender's pages: {state}")

    def _unregister(self) -> None:
        if self._registered:
            self._agent.unregister(self._registered[1])
            self._registered = None

    def _leave(self) -> None:
        try:
            self._unregister()
            if self._sender:
                self._agent.part(self._sender[0])
        except Exception as error:  # noqa: BLE001 - the sender is gone, which NIXL may know already
            logger.info("leaving a NIXL agent: %s", error)


class NixlReceiver(StreamReceiver):
    """Reads from senders that NIXL reaches."""

    name = "nixl"

    def _prepare(self) -> None:
        self._agent = Agent()

    def _make_peer(self, sock: socket.socket) -> Peer:
        return NixlPeer(sock, self._leases, pool=self._pool, config=self._config, agent=self._agent)


class NixlSender(StreamSender):
    """Registers its whole pool once."""

    name = "nixl"

    def __init__(self, pool: PagePool, config: TransportConfig) -> None:
        super().__init__(pool, config)
        self._agent = Agent()
        self._registered = self._agent.register(pool.storage.view(-1))
        self._introduction = self._agent.introduce()
        self._progress = Progress(self._agent)
        self._progress.start()

    def _make_payloads(self) -> Payloads:
        return NixlPayloads(self._pool, self._introduction, self._progress)

    def close(self) -> None:
        super().close()
        if self._registered is not None:
            self._progress.close()
            self._agent.unregister(self._registered)
            self._registered = None


class NixlTransport(Transport):
    """The ``nixl`` transport."""

    receiver, sender = NixlReceiver, NixlSender
