"""Offline generation: one engine in this process, without Ray."""

import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from longctx.attention.cca_paged import CoreAttention
from longctx.attention.config import AttentionConfig
from longctx.engine.build import build_engine
from longctx.engine.config import EngineConfig
from longctx.engine.engine import Engine
from longctx.engine.scoring import score_as_prompt, score_tokens
from longctx.errors import LongctxError, QueueFullError, RequestError
from longctx.messages import GenerationRequest, OutputDelta, SamplingParams
from longctx.models.config import ModelConfig
from longctx.models.tokenizer import Tokenizer
from longctx.request_output import RequestOutput, collect_output

Prompt = str | Sequence[int]


class LLM:
    """A model to generate with.

    Args:
        model: Hugging Face checkpoint folder, or a model that ships: ``demo``, ``demo_landmark``, ``demo_cca``.
        model_config: more about the model; its ``path`` is used unless ``model`` is given, too.
        engine_config: pages, batches and queues.
        attention_config: which attention method runs, and how.

    Threads may share it: each of them computes steps for all. Close it, or use it as a context manager, to give the
    memory back.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        model_config: ModelConfig | None = None,
        engine_config: EngineConfig | None = None,
        attention_config: AttentionConfig | None = None,
    ) -> None:
        config = model_config or ModelConfig()
        if model is not None:
            config = replace(config, path=str(model))
        self._engine: Engine | None = build_engine(config, engine_config or EngineConfig(), attention=attention_config)
        self._inboxes: dict[str, deque[OutputDelta]] = {}
        self._lock = threading.Lock()

    @property
    def engine(self) -> Engine:
        """The engine; raises ``RuntimeError`` once closed."""
        if self._engine is None:
            raise RuntimeError("this LLM is closed")
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return self.engine.tokenizer

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text to be continued."""
        return self.tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[dict[str, Any]], **template_kwargs: Any) -> list[int]:
        """Token ids of a chat, ready for the assistant's answer."""
        return self.tokenizer.encode_chat(messages, **template_kwargs)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Continue one or many prompts.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            params: for all prompts, or one for each; None: the defaults of ``SamplingParams``.

        Returns:
            One output per prompt, in order.

        Raises:
            RequestError: a prompt or a parameter cannot be served; nothing is generated.
        """
        return list(self.generate_in_turn(prompts, params))

    def generate_in_turn(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[RequestOutput]:
        """As ``generate``, all prompts together, but each output is yielded once it and those before it are complete.
        Closing the iterator cancels the rest.

        Args:
            prompts, params: as ``generate`` takes them.
            on_progress: called with (prompt tokens computed, prompt tokens) of the output that is next, before each
                step.

        Raises:
            RequestError: a prompt or a parameter cannot be served; nothing is generated.
        """
        token_ids = [self._encode(prompt) for prompt in _as_list(prompts)]
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(token_ids)
        if len(params) != len(token_ids):
            raise ValueError(f"{len(params)} sampling params for {len(token_ids)} prompts; give one, or one for each")
        requests = [_make_request(*pair) for pair in zip(token_ids, params, strict=True)]
        for request in requests:
            self.engine.check(request)
        return self._generate(requests, on_progress)

    def score(self, prompt: Prompt, *, on_progress: Callable[[int, int], None] | None = None) -> list[float]:
        """Natural-log probability of every token of a given text after its first, given those before it.

        Other threads' requests wait meanwhile.

        Args:
            prompt: a text or token ids, two tokens at least.
            on_progress: called with (tokens computed, tokens) after each chunk.

        Raises:
            RequestError: the text is too short or too long, or holds an id that the model does not know.
            QueueFullError: other threads' requests hold the pages, or under CCA attention are being computed.
        """
        token_ids = self._encode(prompt)
        if len(token_ids) < 2:
            raise RequestError(f"{len(token_ids)} tokens cannot be scored; give at least two", param="prompt")
        engine, last = self.engine, token_ids[-1]
        ids = engine.check(_make_request(token_ids[:-1], SamplingParams()))
        engine.check(_make_request((last,), SamplingParams()))  # it is never computed, so the context need not hold it
        on_chunk = None if on_progress is None else lambda done: on_progress(done, len(ids))
        with self._lock:
            if isinstance(engine.decoder.backend, CoreAttention):
                scored = score_as_prompt(engine, np.append(ids, last), on_chunk=on_chunk)
            else:
                size, pool = engine.config.max_batch_tokens, engine.runner.pool
                scored = score_tokens(
                    engine.decoder, engine.cache, pool, np.append(ids, last), chunk_size=size, on_chunk=on_chunk
                )
        return scored.tolist()

    def chat(
        self, messages: Sequence[dict[str, Any]], params: SamplingParams | None = None, **template_kwargs: Any
    ) -> RequestOutput:
        """Answer a chat, a list of ``{"role": ..., "content": ...}``."""
        return self.generate([self.encode_chat(messages, **template_kwargs)], params)[0]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[OutputDelta]:
        """Continue a prompt, yielding what is new after each step. Closing the iterator cancels the request.

        Args:
            prompt: a text or token ids.
            params: how to sample.
            on_progress: called with (prompt tokens computed, prompt tokens) before each step.

        Raises:
            RequestError: the prompt or a parameter cannot be served.
            QueueFullError: from the iterator, if too many other threads' requests are waiting.
        """
        request = _make_request(self._encode(prompt), params or SamplingParams())
        self.engine.check(request)
        return self._stream(request, on_progress)

    def close(self) -> None:
        """Drop the model and its pages."""
        self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(self.encode_prompt(prompt) if isinstance(prompt, str) else prompt)

    def _stream(
        self, request: GenerationRequest, on_progress: Callable[[int, int], None] | None
    ) -> Iterator[OutputDelta]:
        """Adds the request only now: an iterator that is never asked for anything must cost nothing."""
        self._inboxes[request.request_id] = deque()
        with self._lock:
            self.engine.add(request)
        yield from self._follow(request, lambda request_id: self._report(request_id, on_progress))

    def _generate(
        self, requests: list[GenerationRequest], on_progress: Callable[[int, int], None] | None
    ) -> Iterator[RequestOutput]:
        pending = deque(requests)
        self._inboxes |= {request.request_id: deque() for request in requests}

        def feed(request_id: str) -> None:
            while pending and self._try_add(pending[0]):
                pending.popleft()
            self._report(request_id, on_progress)

        try:
            for request in requests:
                yield collect_output(request, list(self._follow(request, feed)))
        finally:
            for request in requests:
                self._cancel(request)

    def _report(self, request_id: str, on_progress: Callable[[int, int], None] | None) -> None:
        with suppress(KeyError):  # it ended in a step that another thread computed, or is not added yet
            if on_progress is not None:
                on_progress(*self.engine.progress(request_id))

    def _try_add(self, request: GenerationRequest) -> bool:
        with self._lock:
            try:
                self.engine.add(request)
            except QueueFullError:
                return False
        return True

    def _cancel(self, request: GenerationRequest) -> None:
        with self._lock:
            self._inboxes.pop(request.request_id, None)
            if self._engine is not None:
                self._engine.cancel(request.request_id)

    def _follow(self, request: GenerationRequest, before_step: Callable[[str], None]) -> Iterator[OutputDelta]:
        """Deltas of one request until its last sequence ends, computing steps as needed."""
        num_unfinished = request.sampling.n
        try:
            while num_unfinished:
                before_step(request.request_id)
                for delta in self._poll(request.request_id):
                    if delta.finish_reason == "error":
                        raise LongctxError(delta.error or "generation failed")
                    num_unfinished -= delta.finish_reason is not None
                    yield delta
        finally:
            self._cancel(request)

    def _poll(self, request_id: str) -> list[OutputDelta]:
        """What there is for one request; computes a step if there is nothing."""
        with self._lock:
            inbox = self._inboxes[request_id]
            if not inbox:
                self._step()
            deltas = list(inbox)
            inbox.clear()
        return deltas

    def _step(self) -> None:
        """One step for everybody; the deltas go to their requests' inboxes."""
        engine = self.engine
        try:
            deltas = engine.step()
        except Exception as error:
            self._deliver(engine.fail_all(f"the engine failed: {error}"))
            raise
        self._deliver(deltas)

    def _deliver(self, deltas: list[OutputDelta]) -> None:
        for delta in deltas:
            if delta.request_id in self._inboxes:  # not one that a user added at the engine itself
                self._inboxes[delta.request_id].append(delta)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """A list of prompts; one prompt becomes a list of one."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return cast(Sequence[Prompt], prompts)


def _make_request(prompt: tuple[int, ...], params: SamplingParams) -> GenerationRequest:
    return GenerationRequest(uuid.uuid4().hex, prompt, params)
