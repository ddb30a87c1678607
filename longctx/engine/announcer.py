"""Tells exports which pages became final, layer by layer, and what the prompt's last position sampled."""

import logging
from collections.abc import Sequence

from longctx.engine.scheduler import Chunk
from longctx.engine.sequence import ActiveRequest
from longctx.messages import FirstTokens, TokenLogprob
from memory.pages import PageAllocator

logger = logging.getLogger(__name__)


class LayerAnnouncer:
    """One step's ``PackedBatch.on_layer``: tells every export in the step about each layer of its pages.

    An export that raises is told nothing more; the engine fails its request, and nobody else's.
    """

    def __init__(self, pool: PageAllocator) -> None:
        self._pool = pool
        self._num_layers, self._page_size = pool.layout.num_layers, pool.layout.page_size
        self._targets: list[tuple[ActiveRequest, int, list[int]]] = []
        self.failures: dict[str, str] = {}  # request id -> reason

    def prepare(self, chunks: list[Chunk]) -> bool:
        """Set what the coming step makes final; pages found in the prefix cache are announced at once.

        Under CCA attention pages come and go until the last step, which is the one that makes them final.

        Returns whether any chunk of the step is exported.
        """
        self.failures.clear()
        self._targets.clear()
        for chunk in chunks:
            active = chunk.sequence.active
            if active.export is None:
                continue
            cores, pages = chunk.sequence.cores, chunk.sequence.pages
            if cores is not None:
                if chunk.is_last:
                    self._targets.append((active, 0, cores.lasting(pages, chunk.stop, self._page_size)))
                continue
            first = chunk.start // self._page_size
            known = active.num_announced_pages
            if known < first:
                for layer_idx in range(self._num_layers):
                    self._announce(active, layer_idx, known, pages[known:first])
            last = -(-chunk.stop // self._page_size)
            self._targets.append((active, first, pages[first:last]))
            active.num_announced_pages = last
        return bool(self._targets)

    def __call__(self, layer_idx: int) -> None:
        for active, first_page_idx, pages in self._targets:
            self._announce(active, layer_idx, first_page_idx, pages)

    def finish(self, active: ActiveRequest, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> None:
        """The prompt is computed and these are its first tokens."""
        if active.request_id in self.failures:
            return
        known = tuple(logprob for logprob in logprobs if logprob is not None)
        assert active.export is not None
        try:
            active.export.on_prefilled(FirstTokens(tuple(token_ids), known, active.seed, active.num_cached_tokens))
        except Exception as error:  # fails this request alone
            logger.exception("export of %s failed", active.request_id)
            self.failures[active.request_id] = f"export failed: {error}"

    def fail(self, active: ActiveRequest, reason: str) -> None:
        """The request ends without its KV having been taken over; nothing to do if it is not exported."""
        if active.export is None:
            return
        try:
            active.export.on_failed(reason)
        except Exception:  # nothing here depends on it any more
            logger.exception("export of %s did not take its failure", active.request_id)

    def _announce(self, active: ActiveRequest, layer_idx: int, first_page_idx: int, pages: list[int]) -> None:
        if active.request_id in self.failures:
            return
        assert active.export is not None
        try:
            self._pool.note_final(layer_idx, pages)
            active.export.on_layer(layer_idx, first_page_idx, pages)
        except Exception as error:  # the step goes on for the others
            logger.exception("export of %s failed", active.request_id)
            self.failures[active.request_id] = f"export failed: {error}"
