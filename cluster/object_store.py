"""KV through Ray's object store: the fallback where only Ray's own ports are open between the nodes.

The protocol is that of ``tcp``, on a TCP connection of its own; a DATA frame names an object that the sender put into
its node's store, and the receiver gets it, which Ray copies to its node. Each block is copied three times, and a
frame costs Ray milliseconds: make ``transport.frame_bytes`` large. Objects belong to the sender and are freed when
their lease ends, or with its process.

A name is the object's id and its owner's address, as Ray writes them; nothing is unpickled.
"""

import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import ray
import ray.exceptions
import torch
from ray._private.worker import global_worker

from memory.codecs import concatenate
from memory.config import TransportConfig
from memory.frames import MAX_CONTROL_BYTES, Buffer, Header, checksum, read_object
from memory.leases import LeaseError, Session
from memory.link import Payloads
from memory.messages import LeaseGrant
from memory.pages import PagePool
from memory.peer import Peer
from memory.receiver import StreamReceiver
from memory.sender import StreamSender
from memory.staging import make_blocks
from memory.transport import Transport


class ObjectPayloads(Payloads):
    """Frames that name objects."""

    def __init__(self, pool: PagePool) -> None:
        self._layout = pool.layout
        self._blocks = make_blocks(pool)
        self._objects: dict[int, list[ray.ObjectRef]] = {}  # by lease; they live as long as they are here

    def hello(self) -> dict[str, Any]:
        return {"layout": self._layout.digest()}

    def data(
        self, grant: LeaseGrant, layer_idx: int, pages: Sequence[int], ready: torch.cuda.Event | None
    ) -> tuple[Sequence[Buffer], int]:
        buffers = self._blocks.gather(layer_idx, pages, ready)
        blocks = concatenate(buffers)
        reference = ray.put(blocks)
        self._objects.setdefault(grant.lease_id, []).append(reference)
        owner = _core().get_owner_address(reference)
        name = {"object": reference.hex(), "owner": owner.hex(), "checksum": checksum([blocks.data])}
        payload = json.dumps(name).encode()
        return [payload], checksum([payload])

    def forget(self, lease_id: int) -> None:
        self._objects.pop(lease_id, None)

    def close(self) -> None:
        self._objects.clear()


class ObjectPeer(Peer):
    """Gets the objects that frames name."""

    def _fits(self, header: Header) -> bool:
        return header.payload_bytes <= MAX_CONTROL_BYTES

    def _place(self, session: Session, header: Header, pages: Sequence[int], deadline: float) -> bool:
        payload = self._channel.receive(header.payload_bytes, deadline)
        if checksum([payload]) != header.checksum:
            return False
        try:
            name = read_object(payload)
            blocks, expected = self._get(name["object"], name["owner"]), name["checksum"]
        except (ValueError, KeyError, TypeError) as error:
            raise LeaseError(f"a frame names no object: {error}") from None
        if len(blocks) != len(pages) * self._pool.layout.block_bytes or checksum([blocks.data]) != expected:
            return False
        self._put(session, header, pages, blocks)
        return True

    def _get(self, object_id: str, owner: str) -> np.ndarray:
        """uint8 ``[num_bytes]``; raises ``LeaseError`` if the object does not come."""
        make: Any = ray.ObjectRef  # Ray's stubs say str where it takes bytes
        address = bytes.fromhex(owner)
        reference = make(bytes.fromhex(object_id), address)
        _core().deserialize_and_register_object_ref(reference.binary(), ray.ObjectRef.nil(), address, "")
        try:
            blocks = ray.get(reference, timeout=self._config.send_timeout_s)
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise LeaseError(f"Ray did not bring an object: {str(error).splitlines()[0]}") from None
        if not isinstance(blocks, np.ndarray) or blocks.dtype != np.uint8 or blocks.ndim != 1:
            raise ValueError("the object is not bytes of pages")
        return blocks


class ObjectStoreReceiver(StreamReceiver):
    """Receives from any node of the Ray cluster."""

    name = "object_store"
    peer_class = ObjectPeer

    def _prepare(self) -> None:
        _need_ray()


class ObjectStoreSender(StreamSender):
    """Puts blocks into this node's store."""

    name = "object_store"

    def __init__(self, pool: PagePool, config: TransportConfig) -> None:
        _need_ray()
        super().__init__(pool, config)

    def _make_payloads(self) -> Payloads:
        return ObjectPayloads(self._pool)


class ObjectStoreTransport(Transport):
    """The ``object_store`` transport."""

    receiver, sender = ObjectStoreReceiver, ObjectStoreSender


def _core() -> Any:
    """Ray's own end of this process: there is no public way to pass a reference outside Ray's messages that is freed
    again (one that is pickled lives as long as the process)."""
    return cast(Any, global_worker).core_worker


def _need_ray() -> None:
    if not ray.is_initialized():
        raise RuntimeError("transport.name=object_store works in processes of a Ray cluster only")
