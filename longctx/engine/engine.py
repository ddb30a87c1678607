"""The engine: requests in, tokens out, one ``step`` at a time.

A step: the scheduler picks what is computed (``scheduler``), the runner computes it (``runner``), the sampler chooses a
token for every sequence that is up to date, and each token becomes text and perhaps an end (``output``). On a prefill
worker requests come with an export and end after their first token; on a decode worker they come as reservations whose
KV arrives. Not thread-safe: ``EngineLoop`` runs it on one thread.
"""

import logging
import secrets
import time
from collections.abc import Callable

import torch

from longctx.engine.admission import check_request
from longctx.engine.announcer import LayerAnnouncer
from longctx.engine.config import EngineConfig
from longctx.engine.continuation import Continuation
from longctx.engine.export import KVExport, Reservation
from longctx.engine.method import DenseMethod, EngineMethod
from longctx.engine.runner import Runner
from longctx.engine.sampling import Sampler
from longctx.engine.scheduler import Chunk
from longctx.engine.sequence import ActiveRequest, Int64Array, Sequence
from longctx.errors import QueueFullError, RequestError
from longctx.messages import SEED_BITS, EngineStats, FinishReason, FirstTokens, GenerationRequest, OutputDelta
from longctx.models.packed import PackedDecoder
from longctx.models.tokenizer import Tokenizer
from memory.lower_pages import LowerPages
from memory.pages import PageAllocator, PagePool
from memory.prefix_cache import PageStore, PrefixCache
from memory.tiered_pages import TieredPages

logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one model and one page pool.

    Args:
        decoder: the model.
        pool: pages in ``decoder.layout``.
        tokenizer: for text, and for the ids that end one.
        config: batch and queue sizes.
        max_context: tokens of prompt and output together; lowered to what the pool holds.
        make_method: makes the parts that depend on how the decoder attends, from it, the cache, ``config`` and
            ``max_context``.
    """

    def __init__(
        self,
        decoder: PackedDecoder,
        pool: PageAllocator,
        *,
        tokenizer: Tokenizer,
        config: EngineConfig,
        max_context: int,
        make_method: Callable[..., EngineMethod] = DenseMethod,
    ) -> None:
        self.decoder, self.pool, self.tokenizer, self.config = (decoder, pool, tokenizer, config)
        self.cache = PrefixCache(pool, enabled=config.prefix_cache, eviction=config.prefix_eviction)
        self._method = make_method(decoder, self.cache, config=config, max_context=max_context)
        self._rows, self._scheduler, self._runner = self._method.rows, self._method.scheduler, self._method.runner
        self._model_context, self.max_context = max_context, self._method.max_context
        self._sampler = Sampler(decoder.spec.vocab_size, decoder.device)
        self._announcer = LayerAnnouncer(self._method.shipped)
        self._requests: dict[str, ActiveRequest] = {}  # added ones until they end or their export is done
        self._continuation = Continuation(self._scheduler, self._announcer, self._requests)
        self._reserved: dict[str, ActiveRequest] = {}
        self._num_arrivals = self._num_steps = 0
        self._num_prompt_tokens = self._num_cached_tokens = self._num_generated_tokens = 0

    def use_store(self, store: PageStore) -> None:
        """Keep pages of prefixes in a folder, and look for them there."""
        self._scheduler.use_store(store)

    # Requests

    def check(self, request: GenerationRequest) -> Int64Array:
        """The prompt as an array; raises ``RequestError`` if the request cannot be served as it stands."""
        return check_request(
            request,
            vocab_size=self.decoder.spec.vocab_size,
            max_context=self._method.context_of(request),
            model_context=self._model_context,
            max_sequences=self.config.max_sequences,
            hidden_token_id=self.decoder.spec.hidden_token_id,
        )

    def add(self, request: GenerationRequest, *, export: KVExport | None = None) -> None:
        """Queue a request. With ``export`` only its prompt is computed and its first tokens sampled.

        One with ``outputs`` goes on behind them, as if this engine had sampled them; there are no deltas of them. It
        has to name its seed, or be greedy.

        Raises:
            RequestError: the request cannot be served as it stands.
            QueueFullError: ``engine.max_waiting`` requests are waiting.
        """
        active = self._activate(request, export)
        self.check_queue()
        self._requests[active.request_id] = active
        for sequence in active.sequences:
            self._scheduler.enqueue(sequence)

    def has_room(self, request: GenerationRequest) -> bool:
        """Whether a request that is added now could start in the next step, as far as pages and rows go."""
        scheduler = self._scheduler
        if scheduler.is_blocked or scheduler.waiting or not scheduler.has_rows(request.sampling.n):
            return False
        return self.cache.num_available >= scheduler.count_pages(request) + len(self._rows.sequences)

    def check_queue(self) -> None:
        """Raise ``QueueFullError`` if ``add`` would; any thread may ask, and gets what holds about now."""
        if len(self._scheduler.waiting) >= self.config.max_waiting:
            raise QueueFullError(f"{self.config.max_waiting} requests are waiting already (engine.max_waiting)")

    def cancel(self, request_id: str) -> None:
        """End a request or reservation and free its pages; an unknown id is no error."""
        self.release_reservation(request_id)
        active = self._requests.pop(request_id, None)
        if active is None:
            return
        self._drop_sequences(active)
        self._announcer.fail(active, "the request was cancelled")

    def reserve(self, request: GenerationRequest) -> Reservation | None:
        """Take the pages of a prompt whose KV will arrive; None if there is no room now.

        Raises ``RequestError`` as ``add`` does.
        """
        assert self._method.ships_kv
        active = self._activate(request, None)
        sequence, num_rows = active.sequences[0], request.sampling.n
        # Whoever waits here came first.
        if self._scheduler.is_blocked or not self._scheduler.has_rows(num_rows):
            return None
        reserved = self._scheduler.reserve(sequence)
        if reserved is None:
            return None
        self._scheduler.num_reserved_rows += num_rows
        self._reserved[active.request_id] = active
        return Reservation(active.request_id, tuple(reserved[1]), reserved[0], sequence.num_computed)

    def attach(self, request_id: str, first: FirstTokens) -> list[OutputDelta]:
        """The reserved pages are filled: go on from the tokens that the prefill worker sampled.

        Raises ``RequestError`` if nothing is reserved under this id, or the number of tokens is not the request's n.
        """
        active = self._reserved.get(request_id)
        if active is None:
            raise RequestError(f"no pages are reserved for request {request_id!r}", param="request_id")
        params = active.request.sampling
        if len(first.token_ids) != params.n:
            raise RequestError(f"{len(first.token_ids)} first tokens came for n={params.n} sequences", param="n")
        del self._reserved[request_id]
        self._scheduler.num_reserved_rows -= params.n
        self._requests[request_id] = active
        active.num_cached_tokens = first.num_cached_tokens
        source = active.sequences[0]
        source.sampler = active.make_sampler(first.seed)
        self._scheduler.take_over(source)
        logprobs = first.logprobs or [None] * params.n
        return self._continuation.begin(source, source.first_samplers(), first.token_ids, logprobs)

    def release_reservation(self, request_id: str) -> None:
        """Give a reservation's pages back; an unknown id is no error."""
        active = self._reserved.pop(request_id, None)
        if active is not None:
            self._scheduler.num_reserved_rows -= active.request.sampling.n
            self._drop_sequences(active)

    def export_done(self, request_id: str) -> None:
        """The exported KV has arrived, or never will: free its pages. An unknown id is no error."""
        active = self._requests.get(request_id)
        if active is not None and active.export is not None:
            del self._requests[request_id]
            self._drop_sequences(active)

    def fail_all(self, reason: str, finish_reason: FinishReason = "error") -> list[OutputDelta]:
        """End every request (reservations stay) and return the last delta of each of its sequences."""
        deltas = []
        for active in list(self._requests.values()):
            del self._requests[active.request_id]
            for index in active.unfinished_indices if active.export is None else ():
                deltas.append(OutputDelta(active.request_id, index, (), "", finish_reason=finish_reason, error=reason))
            self._drop_sequences(active)
            self._announcer.fail(active, reason)
        return deltas

    # Work

    @property
    def num_requests(self) -> int:
        """Requests that wait, run or are reserved, and exports that have not arrived."""
        return len(self._requests) + len(self._reserved)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would compute something; what waits for pages of exports or reservations does not count."""
        return self._scheduler.has_work

    def step(self) -> list[OutputDelta]:
        """Compute one batch; returns what became known of each sequence that got a token."""
        chunks = self._scheduler.schedule()
        if self._scheduler.is_blocked and self._reserved:
            self._give_exports_back()
        decoding = list(self._rows.sequences)
        if not chunks and not decoding:
            return []
        self._num_steps += 1
        begun = time.perf_counter()
        on_layer = self._announcer if chunks and self._announcer.prepare(chunks) else None
        logits = self._runner.run(chunks, on_layer)
        ended = [chunk.sequence for chunk in chunks if self._advance_chunk(chunk)]
        deltas = self._sample(logits, decoding, ended) if decoding or ended else []
        if on_layer is not None:
            self._fail_exports()
        if self.cache.store is not None and chunks and self.decoder.device.type == "cpu":
            num_tokens = sum(chunk.stop - chunk.start for chunk in chunks)
            self.cache.store.note_computed(num_tokens, time.perf_counter() - begun)
        return deltas

    def progress(self, request_id: str) -> tuple[int, int]:
        """Prompt tokens computed, and in all. Raises ``KeyError`` for a request that is not here (any more)."""
        active = self._requests.get(request_id) or self._reserved[request_id]
        total = len(active.prompt)
        return (total if active.is_forked else active.sequences[0].num_computed), total

    def stats(self) -> EngineStats:
        """What this engine holds and did."""
        layout, scheduler, store = self.pool.layout, self._scheduler, self.cache.store
        return EngineStats(
            num_waiting=len(scheduler.waiting),
            num_running=len(self._rows.sequences) + len(scheduler.prefilling),
            pending_prefill_tokens=scheduler.pending_prefill_tokens,
            num_pages=self.pool.num_pages,
            num_pages_used=self.cache.num_used,
            num_pages_cached=self.cache.num_idle,
            page_size=layout.page_size,
            kv_bytes=self.pool.num_pages * layout.page_bytes,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
            attention=self.decoder.backend.name,
            device=str(self.decoder.device),
            dtype=str(self.decoder.dtype).removeprefix("torch."),
            details={
                "num_steps": float(self._num_steps),
                "num_reserved": float(len(self._reserved)),
                **{f"num_{what}_pages": float(count) for what, count in (store.count_pages() if store else {}).items()},
            },
        )

    @property
    def shipped_pool(self) -> PagePool:
        """The pages of this process, where transports find them; other ranks' are numbered in ``pool`` alone."""
        shipped = self._method.shipped
        return shipped.below if isinstance(shipped, TieredPages | LowerPages) else self._runner.pool

    @property
    def runner(self) -> Runner:
        """What computes the steps."""
        return self._runner

    def keep_alive(self) -> None:
        """Called now and then while there is nothing to compute."""
        self._runner.keep_alive()

    def close(self) -> None:
        """Nothing is computed any more."""
        self._runner.close()
        if self.cache.store is not None:
            self.cache.store.close()

    # Inside

    def _activate(self, request: GenerationRequest, export: KVExport | None) -> ActiveRequest:
        if request.request_id in self._requests or request.request_id in self._reserved:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        prompt = self.check(request)
        assert export is None or self._method.ships_kv
        params, room = request.sampling, self._method.context_of(request) - len(prompt)
        self._num_arrivals += 1
        return ActiveRequest(
            request,
            prompt,
            arrival=self._num_arrivals,
            seed=secrets.randbits(SEED_BITS) if params.seed is None else params.seed,
            max_outputs=room if params.max_tokens is None else min(params.max_tokens, room),
            tokenizer=self.tokenizer,
            export=export,
        )

    def _sample(self, logits: torch.Tensor, decoding: list[Sequence], ended: list[Sequence]) -> list[OutputDelta]:
        """One token for each decoding sequence, and the first ones of each prompt that ended."""
        states = [sequence.sampler for sequence in decoding]
        row_idx = list(range(len(decoding)))
        for idx, sequence in enumerate(ended, start=len(decoding)):
            first_states = sequence.first_samplers()
            states += first_states
            row_idx += [idx] * len(first_states)
        if len(states) > len(logits):  # n > 1: several tokens from one row
            logits = logits[torch.tensor(row_idx, device=logits.device)]
        token_ids, logprobs = self._sampler.sample(logits, states)
        self._num_generated_tokens += len(token_ids)
        num_decoding = len(decoding)
        deltas = self._continuation.extend(decoding, token_ids[:num_decoding], logprobs[:num_decoding])
        taken = num_decoding
        for sequence in ended:
            own = slice(taken, taken + (1 if sequence.active.is_forked else sequence.active.request.sampling.n))
            deltas += self._continuation.begin(sequence, states[own], token_ids[own], logprobs[own])
            taken = own.stop
        return deltas

    def _advance_chunk(self, chunk: Chunk) -> bool:
        """Note that a chunk is computed; returns whether its sequence is up to date."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.stop
        self._scheduler.remember(sequence)
        if not chunk.is_last:
            return False
        self._scheduler.prefilling.remove(sequence)
        if not sequence.active.is_forked:
            self._num_prompt_tokens += len(sequence.active.prompt)
            self._num_cached_tokens += sequence.active.num_cached_tokens
        return True

    def _fail_exports(self) -> None:
        for request_id, reason in self._announcer.failures.items():
            active = self._requests.pop(request_id)
            self._drop_sequences(active)
            self._announcer.fail(active, reason)

    def _give_exports_back(self) -> None:
        """Prompts for others that wait for pages which prompts from others hold: those may be waiting for these.

        Their receivers have pages for them, and compute them themselves.
        """
        for sequence in list(self._scheduler.waiting):
            active = sequence.active
            if active.export is not None:
                del self._requests[active.request_id]
                self._drop_sequences(active)
                self._announcer.fail(
                    active, "no page is left for it, and pages are reserved for prompts from elsewhere"
                )

    def _drop_sequences(self, active: ActiveRequest) -> None:
        for sequence in active.sequences:
            self._scheduler.drop(sequence)
        active.sequences = []
