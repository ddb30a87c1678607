"""Serves one engine of this process: what single-process serving and the endpoint's tests use. No Ray.

The engine runs on its own thread (`longctx/engine/loop.py`); each step's deltas reach the event loop in one call.
"""

import asyncio
import dataclasses
import os
import socket
from collections.abc import AsyncIterator

from cluster.delta_buffer import DeltaBuffer
from cluster.serving import Health, NotReadyError, PromptTokenizer, QueueStats, ServedModel, WorkerHealth, WorkerStats
from longctx.engine.engine import Engine
from longctx.engine.loop import EngineLoop
from longctx.messages import GenerationRequest, OutputDelta

WORKER_NAME = "engine-0"
STATS_TIMEOUT_S = 5.0  # one long step may pass before the engine's thread answers
CLOSE_TIMEOUT_S = 10.0


class LocalBackend:
    """A ``ServingBackend`` over one engine.

    Args:
        engine: built, and not driven by anybody else.
        model: how clients see it; its context is lowered to what the engine's pool holds.
        tokenizer: the model's.
    """

    def __init__(self, engine: Engine, model: ServedModel, *, tokenizer: PromptTokenizer) -> None:
        self.model = dataclasses.replace(model, max_context=min(model.max_context, engine.max_context))
        self.tokenizer = tokenizer
        self._engine = engine
        self._buffers: dict[str, DeltaBuffer] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine_loop: EngineLoop | None = None

    async def start(self) -> None:
        """Start the engine's thread."""
        self._loop = asyncio.get_running_loop()
        self._engine_loop = EngineLoop(self._engine, self._on_deltas, name=WORKER_NAME)

    async def stop(self) -> None:
        """End the requests in flight and join the engine's thread."""
        engine_loop, self._engine_loop = self._engine_loop, None
        for buffer in self._buffers.values():
            buffer.fail(NotReadyError("the server is stopping"))
        if engine_loop:
            await asyncio.to_thread(engine_loop.close, CLOSE_TIMEOUT_S)

    def check_queue(self) -> None:
        """See ``ServingBackend.check_queue``."""
        self._engine.check_queue()

    async def submit(self, request: GenerationRequest) -> AsyncIterator[list[OutputDelta]]:
        """See ``ServingBackend.submit``."""
        engine_loop = self._require_loop()
        buffer = self._buffers[request.request_id] = DeltaBuffer()
        num_unfinished = request.sampling.n
        try:
            await asyncio.wrap_future(engine_loop.call(self._engine.add, request))
            while num_unfinished:
                deltas = await buffer.take()
                num_unfinished -= sum(delta.finish_reason is not None for delta in deltas)
                yield deltas
        finally:
            del self._buffers[request.request_id]
            if num_unfinished and self._engine_loop:  # calls keep their order: the add, if it came through, is first
                self._engine_loop.call(self._engine.cancel, request.request_id)

    def worker_of(self, request_id: str) -> str:
        """There is only one."""
        return WORKER_NAME

    async def health(self) -> Health:
        """Ready while the engine's thread runs."""
        ready = self._engine_loop is not None
        reason = "" if ready else "the engine is not running"
        return Health(ready, reason, (WorkerHealth(WORKER_NAME, "engine", ready, reason),))

    async def worker_stats(self) -> list[WorkerStats]:
        """The engine's state between two steps."""
        stats = self._require_loop().call(self._engine.stats)
        async with asyncio.timeout(STATS_TIMEOUT_S):
            engine = await asyncio.wrap_future(stats)
        return [WorkerStats(WORKER_NAME, "engine", engine, host=socket.gethostname(), pid=os.getpid())]

    def queue(self) -> QueueStats:
        """Nothing waits outside the engine."""
        return QueueStats()

    def _require_loop(self) -> EngineLoop:
        if self._engine_loop is None:
            raise NotReadyError("the engine is not running")
        return self._engine_loop

    def _on_deltas(self, deltas: list[OutputDelta]) -> None:
        """On the engine's thread: one hand-over for the whole step."""
        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, deltas)

    def _dispatch(self, deltas: list[OutputDelta]) -> None:
        for delta in deltas:
            if buffer := self._buffers.get(delta.request_id):
                buffer.put((delta,))
