"""Computes prompts and ships their KV, layer by layer, while the next layer computes (Splitwise, section IV-C)."""

import logging
from collections.abc import Callable

from cluster.first_tokens import encode_first_tokens
from cluster.worker import Worker
from longctx.engine.build import MakePool
from longctx.engine.engine import Engine
from longctx.messages import FirstTokens, GenerationRequest
from memory.layout import KVLayout
from memory.messages import LeaseGrant
from memory.pages import PagePool
from memory.transport import TRANSPORTS, KVSender, KVStream

logger = logging.getLogger(__name__)


class StreamExport:
    """A ``KVExport`` that pushes each layer's pages into a stream of the transport."""

    def __init__(self, stream: KVStream, on_failed: Callable[[str], None]) -> None:
        self._stream = stream
        self._on_failed = on_failed

    def on_layer(self, layer_idx: int, first_page_idx: int, pages: list[int]) -> None:
        """Enqueue this layer of these pages."""
        self._stream.send(layer_idx, range(first_page_idx, first_page_idx + len(pages)), pages)

    def on_prefilled(self, first: FirstTokens) -> None:
        """Commit, with the first tokens."""
        self._stream.commit(encode_first_tokens(first))

    def on_failed(self, reason: str) -> None:
        """Tell the receiver, and the router."""
        self._stream.abort(reason)
        self._on_failed(reason)


class PrefillWorker(Worker):
    """One engine that only computes prompts."""

    role = "prefill"

    def _make_pool(self) -> MakePool | None:
        name = self.config.transport.name
        if name != "auto":
            return TRANSPORTS.get(name).allocate

        def allocate(layout: KVLayout, num_pages: int) -> PagePool:
            # shared_memory's pool serves tcp as well; where /dev/shm has no room, tcp alone is left
            try:
                return TRANSPORTS.get("shared_memory").allocate(layout, num_pages)
            except OSError as error:
                logger.warning("%s; KV travels by tcp", error)
                return TRANSPORTS.get("tcp").allocate(layout, num_pages)

        return allocate

    def _open(self, engine: Engine) -> None:
        self._senders: dict[str, KVSender] = {}
        wanted = TRANSPORTS if self.config.transport.name == "auto" else (self.config.transport.name,)
        for name in wanted:
            try:
                self._senders[name] = TRANSPORTS.get(name).make_sender(engine.pool, self.config.transport)
            except TypeError:  # auto, and the pool is not in shared memory
                if self.config.transport.name != "auto":
                    raise

    async def transports(self) -> tuple[str, ...]:
        """Transports that this worker can send with."""
        return tuple(self._senders)

    async def prefill(self, request: GenerationRequest, grant: LeaseGrant) -> None:
        """Queue a prompt whose KV goes to the holder of ``grant``; ``finished`` of a later report says how it ended.

        Raises ``RequestError`` or ``QueueFullError``, and then nothing was queued.
        """
        await self.on_engine(self._add, request, grant)

    def _add(self, request: GenerationRequest, grant: LeaseGrant) -> None:
        request_id = request.request_id
        engine_loop = self.engine_loop

        def end(reason: str) -> None:
            engine_loop.call(self._end, request_id, reason)

        self.engine.check(request)
        stream = self._senders[grant.transport].open(grant, on_acked=lambda: end(""), on_failed=end)
        export = StreamExport(stream, lambda reason: self.post_finished(request_id, reason))
        try:
            self.engine.add(request, export=export)
        except Exception as error:
            stream.abort(str(error))
            raise

    def _end(self, request_id: str, reason: str) -> None:
        """The receiver has the KV, or refused it."""
        self.engine.export_done(request_id)
        self.post_finished(request_id, reason)

    def _cancel(self, request_id: str) -> None:
        self.engine.cancel(request_id)

    def _reset(self) -> None:
        self.engine.fail_all("a new router began", "abort")

    def _shut(self) -> None:
        for sender in self._senders.values():
            sender.close()

    def _describe_transport(self) -> tuple[str, int]:
        return "+".join(sorted(self._senders)), sum(sender.bytes_shipped for sender in self._senders.values())
