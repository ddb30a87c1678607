"""The HTTP endpoint: the part of the OpenAI API that generates text, health, metrics and status.

An ordinary ASGI application: a replica of Ray Serve runs it (`cluster/serve_app.py`), uvicorn in one process. Left out:
CORS, and the parts of the API that need tools, images or stored conversations. TLS: whoever listens (`cluster/tls.py`).
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.auth import KeyCheck
from cluster.autoscale.board import PoolBoard
from cluster.config import ServerConfig
from cluster.key_ring import KeyRing
from cluster.metrics import Metrics
from cluster.openai_errors import RETRY_AFTER_S, http_error, json_response, to_api_error
from cluster.openapi import describe_api
from cluster.rate_limit import Places, Tenants
from cluster.routes import ChatRoute, CompletionRoute, most_prompts, unknown_model
from cluster.serving import Health, ServingBackend, WorkerStats
from cluster.slo_limit import SloLimit

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 5.0  # for the workers' health and state


def make_app(backend: ServingBackend, server: ServerConfig) -> Starlette:
    """The application; its lifespan starts and stops ``backend``. Raises ``ConfigError`` if the keys cannot be read."""
    metrics = Metrics()
    board = PoolBoard(backend, metrics.window)
    places = Places(server.max_requests, time.monotonic, on_change=metrics.in_progress.set)
    metrics.follow(SloLimit(server, places, on_judged=metrics.note_judged), lambda: places.limit)
    completions = CompletionRoute(backend, server, metrics=metrics, places=places)
    chat = ChatRoute(backend, server, metrics=metrics, places=places)
    ring = KeyRing(server)
    pages = Pages(backend, server, ring, metrics=metrics, places=places, board=board)
    tenants = Tenants(server, has_keys=not ring.is_open)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await backend.start()
        board.loop = asyncio.get_running_loop()
        try:
            yield
        finally:
            await backend.stop()

    app = Starlette(
        routes=[
            Route(completions.path, completions, methods=["POST"]),
            Route(chat.path, chat, methods=["POST"]),
            Route("/v1/models", pages.list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", pages.get_model, methods=["GET"]),
            Route("/health", pages.get_health, methods=["GET"]),
            Route("/metrics", pages.get_metrics, methods=["GET"]),
            Route("/status", pages.get_status, methods=["GET"]),
            Route("/openapi.json", pages.get_description, methods=["GET"]),
        ],
        middleware=[Middleware(FailureGuard), Middleware(KeyCheck, ring, tenants=tenants)],
        exception_handlers={HTTPException: _answer_http_error},
        lifespan=lifespan,
    )
    app.state.board = board
    return app


class Pages:
    """The routes that only tell."""

    def __init__(
        self,
        backend: ServingBackend,
        server: ServerConfig,
        ring: KeyRing,
        *,
        metrics: Metrics,
        places: Places,
        board: PoolBoard,
    ) -> None:
        self._backend = backend
        self._server = server
        self._ring = ring
        self._metrics = metrics
        self._places = places
        self._board = board

    async def list_models(self, request: Request) -> Response:
        """The served model."""
        return json_response({"object": "list", "data": [self._describe_model()]})

    async def get_model(self, request: Request) -> Response:
        """The served model, if the path names it."""
        if request.path_params["name"] != self._backend.model.name:
            raise unknown_model(request.path_params["name"], self._backend)
        return json_response(self._describe_model())

    async def get_health(self, request: Request) -> Response:
        """200 when requests can be served, else 503 with the reason."""
        health = await self._ask_health()
        content = {
            "status": "ready" if health.ready else "not ready",
            "reason": health.reason,
            "model": self._backend.model.name,
        }
        workers = [dataclasses.asdict(worker) for worker in health.workers]
        response = json_response(content | {"workers": workers}, 200 if health.ready else 503)
        if not health.ready:
            response.headers["retry-after"] = f"{RETRY_AFTER_S:.0f}"
        return response

    async def get_metrics(self, request: Request) -> Response:
        """Prometheus text."""
        workers = await self._ask_workers()
        text = self._metrics.render(workers, self._board.describe(workers), self._backend.queue())
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def get_status(self, request: Request) -> Response:
        """Everything that ``longctx status`` shows."""
        health, workers = await self._ask_health(), await self._ask_workers()
        content = {
            "model": self._describe_model(),
            "ready": health.ready,
            "reason": health.reason,
            "requests_in_progress": self._places.num_held,
            "max_requests": self._places.limit,
            "queue": dataclasses.asdict(self._backend.queue()),
            "pools": [dataclasses.asdict(pool) for pool in self._board.describe(workers)],
            "autoscaler_silence_s": self._board.silence_s,
            "workers": [dataclasses.asdict(worker) for worker in workers],
        }
        return json_response(content)

    async def get_description(self, request: Request) -> Response:
        """The OpenAPI description."""
        max_prompts, _ = most_prompts(self._server)
        content = describe_api(
            self._backend.model, self._server, max_prompts=max_prompts, needs_key=not self._ring.is_open
        )
        return json_response(content)

    def _describe_model(self) -> dict[str, Any]:
        model = self._backend.model
        entry = {"id": model.name, "object": "model", "created": model.created, "owned_by": "longctx"}
        return entry | {"max_model_len": model.max_context}

    async def _ask_health(self) -> Health:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                return await self._backend.health()
        except Exception as error:  # noqa: BLE001 - a backend that cannot say is not ready, and this page says so
            return Health(False, f"the workers do not answer: {error or type(error).__name__}")

    async def _ask_workers(self) -> list[WorkerStats]:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                return await self._backend.worker_stats()
        except Exception as error:  # noqa: BLE001 - what is known without them is still worth showing
            logger.warning("the workers' state is not known: %s", error or type(error).__name__)
            return []


class FailureGuard:
    """ASGI middleware, outermost of ours: what nobody caught is answered in the API's shape, never with a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:  # answered and logged
            if scope["type"] != "http" or started:
                raise
            await to_api_error(error).to_response()(scope, receive, send)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = http_error(error.status_code, method=request.method, path=request.url.path)
    answer.headers.update(error.headers or {})
    return answer.to_response()
