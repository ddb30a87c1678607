"""Serves an ASGI application over HTTP from a running event loop, without taking the process's signals."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from cluster.config import ServerConfig
from cluster.port import listen
from cluster.tls import server_context
from longctx.errors import LongctxError

KEEP_ALIVE_S = 75  # longer than clients keep an idle connection, so that they close first
ENDING_S = 5.0  # how long answers that were ended may take to be sent


class Listener:
    """One application on ``server.host`` and ``server.port``; ``start`` and ``stop`` run its lifespan too.

    Args:
        app: what answers.
        server: where, and with which certificate.
        grace_s: how long ``stop`` lets requests finish before the lifespan ends them.
    """

    def __init__(self, app: Starlette, server: ServerConfig, *, grace_s: float) -> None:
        self._server = server
        self._grace_s = grace_s
        self._lifespan = app.router.lifespan_context(app)
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        config.load()
        config.ssl = server_context(server) if server.tls_certificate is not None else None
        self._runner = _Runner(config)
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to listen; raises ``ConfigError`` if it cannot."""
        listening = listen(self._server)
        await self._lifespan.__aenter__()
        self._running = asyncio.create_task(self._runner.serve([listening]))
        while not self._runner.started:
            self.check()
            await asyncio.sleep(0.01)

    def check(self) -> None:
        """Raises ``LongctxError`` if it does not listen any more."""
        if self._running is None or self._running.done():
            raise LongctxError("the endpoint does not listen")

    async def stop(self) -> None:
        """Take no more requests, and end those that do not finish in time."""
        if self._running is None:
            return
        self._runner.should_exit = True
        await asyncio.wait({self._running}, timeout=self._grace_s)
        await self._lifespan.__aexit__(None, None, None)
        await asyncio.wait({self._running}, timeout=ENDING_S)
        self._running.cancel()


class _Runner(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Not ours to handle."""
        yield
