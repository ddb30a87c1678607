"""The two routes that generate. Each request: admitted, read, checked, tokenised, generated, answered, counted.

What overload refuses is refused before anything of the body is read, but for what only a prompt's tokens tell.
"""

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
from cluster.deadline import Deadline
from cluster.generation import Generation
from cluster.logprobs import TokenTexts
from cluster.metrics import Metrics
from cluster.openai_errors import ApiError, busy, to_api_error
from cluster.openai_schema import Call, check_model, parse_chat, parse_completion
from cluster.prompts import echo_prompts, encode_messages, encode_prompts, make_requests
from cluster.rate_limit import LIMITED, Places, Tenant
from cluster.request_body import read_json
from cluster.serving import ServingBackend
from cluster.slot import Slot, tenant_of
from cluster.sse import Answer, stream_answer, whole_answer
from longctx.errors import QueueFullError, RequestError
from longctx.messages import GenerationRequest
from parallel.option import parse_size

logger = logging.getLogger(__name__)

OUTCOMES = {400: "invalid", 404: "invalid", 408: "invalid", 413: "invalid", 429: "queue_full", 504: "deadline"}
REFUSED = (429, 503)


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
        metrics, places: shared by the routes.
    """

    path: str
    id_prefix: str
    prompt_param: str  # the field that holds the prompt

    def __init__(self, backend: ServingBackend, server: ServerConfig, *, metrics: Metrics, places: Places) -> None:
        self._backend = backend
        self._server = server
        self._metrics = metrics
        self._places = places
        self._max_bytes = parse_size(server.max_body_bytes)
        self._texts = TokenTexts(backend.tokenizer)

    @abstractmethod
    async def prepare(self, body: dict[str, Any], request_id: str, tenant: Tenant) -> Job:
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
        slot = Slot(self._places, tenant_of(scope))
        deadline = Deadline(self._server.request_timeout_s)
        try:
            slot.take(1)
            self._backend.check_queue()
            async with deadline:
                deadline.read_header(scope)
                job = await self._read_job(scope, receive, request_id, deadline)
                slot.take(len(job.requests) - 1)
                slot.charge(job.requests, max_context=self._backend.model.max_context)
                work = self._generate(answer, job, slot, started)
                await run_while_connected(work, receive, answered=lambda: answer.ended)
        except ClientGoneError:
            logger.info("%s: the client is gone", request_id)
            return "cancelled"
        except Exception as error:  # noqa: BLE001 - every failure is answered, none is a 500
            failure = self._explain(error, deadline)
            slot.give_back(is_refused=failure.status in REFUSED)
            await answer.fail(failure)
            if failure.code == LIMITED:
                return "rate_limited"
            return OUTCOMES.get(failure.status, "error")
        finally:
            slot.give_back()
        return "ok"

    async def _read_job(self, scope: Scope, receive: Receive, request_id: str, deadline: Deadline) -> Job:
        body = await read_json(scope, receive, max_bytes=self._max_bytes)
        name = check_model(body)
        if name != self._backend.model.name:
            raise unknown_model(name, self._backend)
        deadline.read_field(body)
        return await self.prepare(body, request_id, tenant_of(scope))

    async def _generate(self, answer: Answer, job: Job, slot: Slot, started: float) -> None:
        # A client that has the end of its answer may ask again at once: its place has to be free by then.
        async with Generation(
            self._backend, job.requests, metrics=self._metrics, started=started, on_end=slot.give_back
        ) as generation:
            try:
                if job.call.stream:
                    await stream_answer(answer, generation, job.form, include_usage=job.call.include_usage)
                    return
                response = await whole_answer(generation, job.form)
            finally:
                slot.settle(generation.num_generated)
        await answer.respond(response)

    def _explain(self, error: Exception, deadline: Deadline) -> ApiError:
        """The error as this path's clients know it: the engine calls every prompt ``prompt``."""
        if (late := deadline.explain(error)) is not None:
            return late
        if isinstance(error, QueueFullError):
            return busy(str(error), retry_after_s=self._places.retry_after_s())
        if isinstance(error, RequestError) and error.param == "prompt":
            error = RequestError(str(error), param=self.prompt_param, code=error.code)
        return to_api_error(error)

    def _make_requests(
        self, prompts: Sequence[tuple[int, ...]], call: Call, request_id: str, tenant: Tenant
    ) -> list[GenerationRequest]:
        return make_requests(
            prompts,
            call,
            cache_salt=tenant.salt(call.cache_salt),
            model=self._backend.model,
            request_id=request_id,
            param=self.prompt_param,
        )

    def _head(self, request_id: str, kind: str) -> dict[str, Any]:
        return {"id": request_id, "object": kind, "created": int(time.time()), "model": self._backend.model.name}


class CompletionRoute(GenerateRoute):
    """``/v1/completions``."""

    path = "/v1/completions"
    id_prefix = "cmpl"
    prompt_param = "prompt"

    async def prepare(self, body: dict[str, Any], request_id: str, tenant: Tenant) -> Job:
        """See ``GenerateRoute``."""
        model, tokenizer = self._backend.model, self._backend.tokenizer
        max_prompts, limit = most_prompts(self._server)
        call = parse_completion(body, model, max_prompts=max_prompts, limit=limit)
        prompts = await encode_prompts(call, tokenizer, model)
        requests = self._make_requests(prompts, call, request_id, tenant)
        echoes = await echo_prompts(call, tokenizer)
        head = self._head(request_id, "text_completion")
        return Job(call, requests, CompletionFormat(head, echoes, texts=self._texts, include_usage=call.include_usage))


class ChatRoute(GenerateRoute):
    """``/v1/chat/completions``."""

    path = "/v1/chat/completions"
    id_prefix = "chatcmpl"
    prompt_param = "messages"

    async def prepare(self, body: dict[str, Any], request_id: str, tenant: Tenant) -> Job:
        """See ``GenerateRoute``."""
        model = self._backend.model
        call = parse_chat(body, model)
        prompts = await encode_messages(call, self._backend.tokenizer, model)
        requests = self._make_requests(prompts, call, request_id, tenant)
        head = self._head(request_id, "chat.completion")
        return Job(
            call, requests, ChatFormat(head, call.sampling.n, texts=self._texts, include_usage=call.include_usage)
        )


def most_prompts(server: ServerConfig) -> tuple[int, str]:
    """Prompts that one request may hold, and the limit that says so: more would never find room."""
    names = ("max_requests", "key_max_requests", "key_requests_per_minute")
    limits = [(getattr(server, name), f"server.{name}") for name in names]
    return min((limit for limit in limits if limit[0]), key=lambda limit: limit[0])


def unknown_model(name: str, backend: ServingBackend) -> ApiError:
    """404 that names what is served."""
    text = f"model {name[:200]!r} is not served here; {backend.model.name!r} is"
    return ApiError(404, text, param="model", code="model_not_found")
