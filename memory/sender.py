"""The sending half of the push protocol: one link for each receiver's address, shared by the streams to it.

Subclasses say what a DATA frame carries (``Payloads``).
"""

import ssl
import threading
from abc import abstractmethod
from collections.abc import Callable

from memory.config import TransportConfig
from memory.convert import can_convert
from memory.frames import MAX_FRAME_PAGES, Kind
from memory.link import Link, Payloads
from memory.messages import LeaseGrant
from memory.pages import PagePool
from memory.stream import Order, Stream
from memory.transport import KVSender, KVStream
from parallel.option import parse_size


class StreamSender(KVSender):
    """See ``KVSender``."""

    name: str
    converts = False  # whether it can send to pools of another element type
    _tls: ssl.SSLContext | None = None  # what connections are secured with

    def __init__(self, pool: PagePool, config: TransportConfig) -> None:
        self._pool = pool
        self._config = config
        block_bytes = pool.layout.block_bytes
        self._pages_per_frame = max(1, min(MAX_FRAME_PAGES, parse_size(config.frame_bytes) // block_bytes))
        self._lock = threading.Lock()
        self._links: dict[str, Link] = {}
        self._closed = False
        self.bytes_shipped = 0

    @abstractmethod
    def _make_payloads(self) -> Payloads:
        """What a new link puts into frames."""

    def open(self, grant: LeaseGrant, *, on_acked: Callable[[], None], on_failed: Callable[[str], None]) -> KVStream:
        if grant.transport != self.name:
            raise ValueError(f"the grant is for transport {grant.transport!r}, this sender's is {self.name!r}")
        if grant.layout != self._pool.layout and not (self.converts and can_convert(self._pool.layout, grant.layout)):
            other = "" if self.converts else f" (transport {self.name} cannot change the KV dtype, tcp can)"
            raise ValueError(
                f"the receiver's KV layout is {grant.layout}, this worker's {self._pool.layout}: prefill and decode "
                f"workers must have the same model, page size and attention{other}"
            )
        stream = Stream(grant, self._pool, on_acked=on_acked, on_failed=on_failed)
        with self._lock:
            if self._closed:
                raise RuntimeError("the sender is closed")
            self._links = {address: link for address, link in self._links.items() if link.is_alive()}
            link = self._links.get(grant.address)
            if link is None or not link.put(Order(stream, Kind.HELLO)):
                link = self._links[grant.address] = self._make_link(grant.address)
                link.put(Order(stream, Kind.HELLO))
                link.start()
            stream.put = link.put
        return stream

    def close(self) -> None:
        with self._lock:
            self._closed = True
            links = list(self._links.values())
            self._links = {}
        for link in links:
            link.close()
        for link in links:
            if link is not threading.current_thread():
                link.join(self._config.connect_timeout_s + self._config.send_timeout_s)

    def _make_link(self, address: str) -> Link:
        return Link(
            address,
            self._config,
            payloads=self._make_payloads(),
            pages_per_frame=self._pages_per_frame,
            on_shipped=self._count,
            tls=self._tls,
        )

    def _count(self, num_pages: int) -> None:
        with self._lock:
            self.bytes_shipped += num_pages * self._pool.layout.block_bytes
