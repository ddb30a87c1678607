"""Each rank ships its own pages of a prompt, layer by layer, straight to the decode worker, not through rank 0.

Rank 0's engine tells its own part of an export what is final (``longctx/engine/announcer.py``); the other ranks find
out from the steps.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from longctx.shards.step import Step
from memory.pages import PageAllocator

logger = logging.getLogger(__name__)


class PageSink(Protocol):
    """Where pages of one request go (``memory.transport.KVStream``). No method blocks."""

    def send(self, layer_idx: int, page_idxs: Sequence[int], pages: Sequence[int]) -> None:
        """This layer of the sequence's pages ``page_idxs`` is final and lies in this rank's ``pages``."""
        ...

    def commit(self, payload: bytes) -> None:
        """Everything of this rank was sent."""
        ...

    def abort(self, reason: str) -> None:
        """Nothing more will come."""
        ...


@dataclass(frozen=True, slots=True)
class OwnPages:
    """Which of the pages that rank 0 numbers are this rank's."""

    rank: int = 0
    pages_per_rank: int = 1 << 62  # of a single rank, all are its own

    def select(self, first_page_idx: int, pages: Sequence[int] | npt.NDArray[np.int32]) -> tuple[list[int], list[int]]:
        """Index in the sequence, and this rank's number, of each of its pages among ``pages``."""
        numbers = np.asarray(pages, dtype=np.int64)
        own = np.flatnonzero(numbers // self.pages_per_rank == self.rank)
        return (own + first_page_idx).tolist(), (numbers[own] % self.pages_per_rank).tolist()


@dataclass(slots=True)
class _Export:
    sinks: Sequence[PageSink]
    num_announced: int = 0  # pages of the sequence whose every layer was told of


class RankExports:
    """What a rank other than 0 ships. Used on the thread that computes, but for ``open`` and ``close``.

    Args:
        own: this rank's numbers of pages.
        pages: are told what is final before it is sent.
    """

    def __init__(self, own: OwnPages, pages: PageAllocator) -> None:
        self._own, self._pages = own, pages
        self._num_layers, self._page_size = pages.layout.num_layers, pages.layout.page_size
        self._exports: dict[str, _Export] = {}

    def open(self, request_id: str, sinks: Sequence[PageSink]) -> None:
        """From now on this rank's pages of the request go to ``sinks``."""
        self._exports[request_id] = _Export(sinks)

    def close(self, request_id: str, reason: str) -> None:
        """Nothing more is sent; an unknown request is no error."""
        export = self._exports.pop(request_id, None)
        for sink in export.sinks if export else ():
            sink.abort(reason)

    def begin(self, step: Step) -> Callable[[int], None] | None:
        """What to call with each layer's index once its keys are stored; None if the step ships nothing.

        Pages that were found in the prefix cache are sent at once.
        """
        targets = []
        for segment in step.segments:
            export = self._exports.get(segment.export)
            if export is None:
                continue
            first, last = segment.start // self._page_size, -(-segment.stop // self._page_size)
            if export.num_announced < first:
                cached = self._own.select(export.num_announced, segment.pages[export.num_announced : first])
                for layer_idx in range(self._num_layers):
                    self._send(segment.export, layer_idx, *cached)
            targets.append((segment.export, *self._own.select(first, segment.pages[first:last])))
            export.num_announced = last

        def on_layer(layer_idx: int) -> None:
            for request_id, page_idxs, pages in targets:
                self._send(request_id, layer_idx, page_idxs, pages)

        return on_layer if targets else None

    def end(self, step: Step) -> None:
        """The step is computed: what it finished is committed."""
        for segment in step.segments:
            export = self._exports.pop(segment.export, None) if segment.samples else None
            for sink in export.sinks if export else ():
                sink.commit(b"")

    def _send(self, request_id: str, layer_idx: int, page_idxs: list[int], pages: list[int]) -> None:
        export = self._exports.get(request_id)
        if export is None or not pages:
            return
        try:
            self._pages.note_final(layer_idx, pages)
            for sink in export.sinks:
                sink.send(layer_idx, page_idxs, pages)
        except Exception as error:  # the receiver fails the lease, and so this request alone
            logger.exception("export of %s failed", request_id)
            self.close(request_id, f"export failed: {error}")
