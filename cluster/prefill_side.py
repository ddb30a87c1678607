"""Computes prompts and ships their KV, layer by layer, while the next layer computes (Splitwise, section IV-C)."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from cluster.first_tokens import encode_first_tokens
from cluster.shipping import open_senders
from cluster.worker import Worker
from longctx.errors import LongctxError
from longctx.messages import FirstTokens, GenerationRequest
from longctx.shards.exports import OwnPages
from memory.messages import LeaseGrant
from memory.transport import KVStream

logger = logging.getLogger(__name__)


class StreamExport:
    """A ``KVExport`` that pushes each layer's pages into streams, one to each rank of the receiver.

    Args:
        own: which pages are this rank's; the others ship theirs.
        on_failed: called if the prompt is not computed to its end, with the reason.
    """

    def __init__(self, own: OwnPages, on_failed: Callable[[str], None]) -> None:
        self._own, self._on_failed = own, on_failed
        self.streams: list[KVStream] = []
        self.prefilled = 0.0  # time.monotonic() at which the prompt was computed

    def on_layer(self, layer_idx: int, first_page_idx: int, pages: list[int]) -> None:
        """Enqueue this layer of these pages."""
        page_idxs, own_pages = self._own.select(first_page_idx, pages)
        for stream in self.streams if own_pages else ():
            stream.send(layer_idx, page_idxs, own_pages)

    def on_prefilled(self, first: FirstTokens) -> None:
        """Commit, with the first tokens."""
        self.prefilled = time.monotonic()
        payload = encode_first_tokens(first)
        for stream in self.streams:
            stream.commit(payload)

    def on_failed(self, reason: str) -> None:
        """Tell the receiver, and the router."""
        self.abort(reason)
        self._on_failed(reason)

    def abort(self, reason: str) -> None:
        """Tell the receiver alone."""
        for stream in self.streams:
            stream.abort(reason)


class PrefillSide:
    """What a worker does for prompts that others decode. Made once the worker's engine is there.

    Args:
        worker: whose engine computes them.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.senders = open_senders(worker.engine.shipped_pool, worker.config.transport)
        self.num_shipped, self.residual_s = 0, 0.0  # see WorkerStats

    async def prefill(self, request: GenerationRequest, grants: Sequence[LeaseGrant]) -> None:
        """Queue a prompt whose KV goes to the holders of ``grants``; ``finished`` of a later report says how it ended.

        Raises ``RequestError`` or ``QueueFullError``, and then nothing was queued.
        """
        request_id = request.request_id
        if self._worker.ranks:
            await self._worker.ranks.call_all("open_export", request_id, grants)
        try:
            await self._worker.on_engine(self._add, request, grants)
        except BaseException as error:
            self._close_exports(request_id, str(error))
            raise

    def _add(self, request: GenerationRequest, grants: Sequence[LeaseGrant]) -> None:
        request_id, engine, engine_loop = request.request_id, self._worker.engine, self._worker.engine_loop
        engine.check(request)
        own = OwnPages(0, engine.shipped_pool.num_pages)
        export = StreamExport(own, lambda reason: self._fail(request_id, reason))
        unacked = set(range(len(grants)))

        def end(index: int, reason: str) -> None:
            engine_loop.call(self._end, request_id, export, unacked, index, reason, time.monotonic())

        try:
            for index, grant in enumerate(grants):
                sender = self.senders[grant.transport]
                stream = sender.open(grant, on_acked=partial(end, index, ""), on_failed=partial(end, index))
                export.streams.append(stream)
            engine.add(request, export=export)
        except Exception as error:
            export.abort(str(error))
            raise

    def _end(
        self, request_id: str, export: StreamExport, unacked: set[int], index: int, reason: str, acked: float
    ) -> None:
        """A receiver has the KV, or refused it; once all have, or one has not, the prompt's pages are free."""
        if index not in unacked:  # another one's refusal came before
            return
        unacked.discard(index)
        if unacked and not reason:
            return
        unacked.clear()
        if reason:
            export.abort(reason)
            self._close_exports(request_id, reason)
        else:
            self.num_shipped += 1
            self.residual_s += acked - export.prefilled
        self._worker.engine.export_done(request_id)
        self._worker.post_finished(request_id, reason)

    def _fail(self, request_id: str, reason: str) -> None:
        self._close_exports(request_id, reason)
        self._worker.post_finished(request_id, reason)

    def _close_exports(self, request_id: str, reason: str) -> None:
        """The other ranks send nothing more of the prompt; from any thread."""
        if self._worker.ranks:
            self._worker.from_other_thread(partial(self._close_rank_exports, request_id, reason))

    async def _close_rank_exports(self, request_id: str, reason: str) -> None:
        with suppress(LongctxError, TimeoutError):  # a lost rank sends nothing
            await self._worker.ranks.call_all("close_export", request_id, reason)

    def close(self) -> None:
        """The engine has stopped: nothing is sent any more."""
        for sender in self.senders.values():
            sender.close()
