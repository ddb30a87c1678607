"""All prompts of one HTTP request being generated: one stream of deltas, one usage, one end."""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from cluster.delta_buffer import DeltaBuffer
from cluster.metrics import Metrics, TokenTimer
from cluster.openai_errors import unavailable
from cluster.serving import ServingBackend
from longctx.messages import GenerationRequest, OutputDelta


class Generation:
    """Runs requests together; an async context manager that cancels, on exit, what has not ended.

    Args:
        backend: who generates.
        requests: one for each prompt, with the same number of sequences.
        metrics: records the times of tokens.
        started: ``time.perf_counter()`` at the HTTP request's arrival.
        on_end: called once all sequences have ended, before their last text is passed on.
    """

    def __init__(
        self,
        backend: ServingBackend,
        requests: Sequence[GenerationRequest],
        *,
        metrics: Metrics,
        started: float,
        on_end: Callable[[], None],
    ) -> None:
        self._on_end = on_end
        self._backend = backend
        self._requests = requests
        self._buffer = DeltaBuffer()
        self._tasks: list[asyncio.Task[None]] = []
        self._timers = {
            request.request_id: TokenTimer(metrics, started, len(request.prompt_token_ids)) for request in requests
        }
        self._first_choice = {request.request_id: i * request.sampling.n for i, request in enumerate(requests)}
        self._num_cached: dict[str, int] = {}
        self.num_generated = 0
        self.num_choices = sum(request.sampling.n for request in requests)
        self.num_unfinished = self.num_choices

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._pump(request)) for request in self._requests]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A cancelled task closes its generator, and that cancels the request wherever it runs.
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def take(self, timeout_s: float | None = None) -> list[tuple[int, OutputDelta]]:
        """(Choice index, delta) of everything new; empty after ``timeout_s`` seconds without news.

        Raises what the backend raised, and ``ApiError`` if a sequence ended in an error.
        """
        return [self._account(delta) for delta in await self._buffer.take(timeout_s)]

    def usage(self) -> dict[str, Any]:
        """Token counts so far, as the API shows them."""
        num_prompt = sum(len(request.prompt_token_ids) for request in self._requests)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_generated,
            "total_tokens": num_prompt + self.num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached.values())},
        }

    def _account(self, delta: OutputDelta) -> tuple[int, OutputDelta]:
        if delta.finish_reason in ("error", "abort"):
            raise unavailable(delta.error or "the request was aborted by the server", code="generation_failed")
        self._timers[delta.request_id].record(delta, self._backend.worker_of)
        self.num_generated += len(delta.token_ids)
        self._num_cached[delta.request_id] = max(self._num_cached.get(delta.request_id, 0), delta.num_cached_tokens)
        self.num_unfinished -= delta.finish_reason is not None
        if not self.num_unfinished:
            self._on_end()
        return self._first_choice[delta.request_id] + delta.index, delta

    async def _pump(self, request: GenerationRequest) -> None:
        """Move one request's deltas into the buffer as they come: a slow client holds nobody up."""
        num_unfinished = request.sampling.n
        try:
            async for deltas in self._backend.submit(request):
                num_unfinished -= sum(delta.finish_reason is not None for delta in deltas)
                self._buffer.put(deltas)
        except Exception as error:  # noqa: BLE001 - handed to the consumer, who answers with it
            self._buffer.fail(error)
            return
        if num_unfinished > 0:
            self._buffer.fail(unavailable("the output ended without a finish reason", code="generation_failed"))
