"""The two routes that generate. Each request: admitted, read, checked, tokenised, generated, answered, counted."""

import asyncio
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from cluster.answers import AnswerFormat, ChatFormat, CompletionFormat
from cluster.config import ServerConfig
from cluster.connection import ClientGoneError, run_while_connected
from cluster.generation import Generation
from cluster.logprobs import TokenTexts
from cluster.metrics import Metrics
from cluster.openai_errors import ApiError, busy, to_api_error, unavailable
from cluster.openai_schema import Call, check_model, parse_chat, parse_completion
from cluster.prompts import echo_prompts, encode_messages, encode_prompts, make_requests
from cluster.request_body import read_json
from cluster.serving import ServingBackend
from cluster.sse import Answer, stream_answer, whole_answer
from longctx.errors import RequestError
from longctx.messages import GenerationRequest
from parallel.option import parse_size

logger = logging.getLogger(__name__)

OUTCOMES = {400: "invalid", 404: "invalid", 408: "invalid", 413: "invalid", 429: "queue_full", 503: "error"}


class Admission:
    """How many prompts are being served or waiting, and how many may be."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self.limit = limit
        self.num_held = 0
        self._metrics = metrics

    def change(self, count: int) -> None:
        """Add ``count``, which may be negative."""
        self.num_held += count
        self._metrics.in_progress.set(self.num_held)


class Slot:
    """What one HTTP request holds of the admission: one place for each prompt."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_held = 0

    def take(self, count: int) -> None:
        """Hold ``count`` more places or raise ``ApiError`` 429."""
        admission = self._admission
        if admission.num_held + count > admission.limit:
            raise busy(
                f"{admission.num_held} requests are served or waiting; {admission.limit} may be (server.max_requests)"
            )
        self._num_held += count
        admission.change(count)

    def give_back(self) -> None:
        """The request has ended."""
        self._admission.change(-self._num_held)
        self._num_held = 0


@dataclass(frozen=True, slots=True)
class Job:
    """A request that is ready to be generated."""

    call: Call
    requests: Sequence[GenerationRequest]
    form: AnswerFormat


class GenerateRoute(ABC):
    """ASGI application of one path.

    Args:
        backend: who generates.
        server: limits.
        metrics, admission: shared by the routes.
    """

    path: str
    id_prefix: str
    prompt_param: str  # the field that holds the prompt

    def __init__(
        self, backend: ServingBackend, server: ServerConfig, *, metrics: Metrics, admission: Admission
    ) -> None:
        self._backend = backend
        self._server = server
        self._metrics = metrics
        self._admission = admission
        self._max_bytes = parse_size(server.max_body_bytes)
        self._texts = TokenTexts(backend.tokenizer)

    @abstractmethod
    async def prepare(self, body: dict[str, Any], request_id: str) -> Job:
        """Check and tokenise; raises ``RequestError``."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        request_id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        answer = Answer(scope, receive, send, request_id=request_id)
        outcome = "cancelled"
        try:
            outcome = await self._serve(scope, receive, answer, request_id=request_id, started=started)
        finally:
            self._metrics.requests.labels(self.path, outcome).inc()
            self._metrics.request_time.labels(self.path).observe(time.perf_counter() - started)

    async def _serve(self, scope: Scope, receive: Receive, answer: Answer, *, request_id: str, started: float) -> str:
        """Answer, with an error if need be; returns the outcome."""
        slot = Slot(self._admission)
        deadline = asyncio.timeout(self._server.request_timeout_s)
        try:
            slot.take(1)
            async with deadline:
                job = await self._read_job(scope, receive, request_id)
                slot.take(len(job.requests) - 1)
                work = self._generate(answer, job, started)
                await run_while_connected(work, receive, answered=lambda: answer.ended)
        except ClientGoneError:
            logger.info("%s: the client is gone", request_id)
            return "cancelled"
        except Exception as error:  # noqa: BLE001 - every failure is answered, none is a 500
            failure = self._explain(error, timed_out=deadline.expired())
            await answer.fail(failure)
            return OUTCOMES.get(failure.status, "error")
        finally:
            slot.give_back()
        return "ok"

    async def _read_job(self, scope: Scope, receive: Receive, request_id: str) -> Job:
        body = await read_json(scope, receive, max_bytes=self._max_bytes)
        name = check_model(body)
        if name != self._backend.model.name:
            raise unknown_model(name, self._backend)
        return await self.prepare(body, request_id)

    async def _generate(self, answer: Answer, job: Job, started: float) -> None:
        async with Generation(self._backend, job.requests, metrics=self._metrics, started=started) as generation:
            if job.call.stream:
                await stream_answer(answer, generation, job.form, include_usage=job.call.include_usage)
                return
            response = await whole_answer(generation, job.form)
        await answer.respond(response)

    def _explain(self, error: Exception, *, timed_out: bool) -> ApiError:
        """The error as this path's clients know it: the engine calls every prompt ``prompt``."""
        if timed_out and isinstance(error, TimeoutError):
            text = f"the request took more than {self._server.request_timeout_s:g} seconds (server.request_timeout_s)"
            return unavailable(text, code="timeout")
        if isinstance(error, RequestError) and error.param == "prompt":
            error = RequestError(str(error), param=self.prompt_param, code=error.code)
        return to_api_error(error)

    def _head(self, request_id: str, kind: str) -> dict[str, Any]:
        return {"id": request_id, "object": kind, "created": int(time.time()), "model": self._backend.model.name}


class CompletionRoute(GenerateRoute):
    """``/v1/completions``."""

    path = "/v1/completions"
    id_prefix = "cmpl"
    prompt_param = "prompt"

    async def prepare(self, body: dict[str, Any], request_id: str) -> Job:
        """See ``GenerateRoute``."""
        model, tokenizer = self._backend.model, self._backend.tokenizer
        call = parse_completion(body, model, max_prompts=self._server.max_requests)
        prompts = await encode_prompts(call, tokenizer, model)
        requests = make_requests(prompts, call, model=model, request_id=request_id, param=self.prompt_param)
        echoes = await echo_prompts(call, tokenizer)
        head = self._head(request_id, "text_completion")
        return Job(call, requests, CompletionFormat(head, echoes, texts=self._texts, include_usage=call.include_usage))


class ChatRoute(GenerateRoute):
    """``/v1/chat/completions``."""

    path = "/v1/chat/completions"
    id_prefix = "chatcmpl"
    prompt_param = "messages"

    async def prepare(self, body: dict[str, Any], request_id: str) -> Job:
        """See ``GenerateRoute``."""
        model = self._backend.model
        call = parse_chat(body, model)
        prompts = await encode_messages(call, self._backend.tokenizer, model)
        requests = make_requests(prompts, call, model=model, request_id=request_id, param=self.prompt_param)
        head = self._head(request_id, "chat.completion")
        return Job(
            call, requests, ChatFormat(head, call.sampling.n, texts=self._texts, include_usage=call.include_usage)
        )


def unknown_model(name: str, backend: ServingBackend) -> ApiError:
    """404 that names what is served."""
    text = f"model {name[:200]!r} is not served here; {backend.model.name!r} is"
    return ApiError(404, text, param="model", code="model_not_found")
