"""The endpoint's own listener: an application and its lifespan, in an event loop that is there already."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cluster.config import ServerConfig
from cluster.listener import Listener
from longctx.errors import ConfigError, LongctxError
from tests.cli_server import free_port


class Backend:
    """What a lifespan starts and ends; a request to ``/wait`` lasts as long as it."""

    def __init__(self) -> None:
        self.waiting, self.ended = asyncio.Event(), asyncio.Event()
        self.app = Starlette(routes=[Route("/", self.answer), Route("/wait", self.wait)], lifespan=self.live)

    @asynccontextmanager
    async def live(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self.ended.set()

    async def answer(self, request: Request) -> Response:
        return PlainTextResponse("here")

    async def wait(self, request: Request) -> Response:
        self.waiting.set()
        await self.ended.wait()
        return PlainTextResponse("the server is stopping", 503)


async def start(backend: Backend, *, grace_s: float = 0.2) -> tuple[Listener, str]:
    server = ServerConfig(port=free_port())
    listener = Listener(backend.app, server, grace_s=grace_s)
    await listener.start()
    return listener, f"http://127.0.0.1:{server.port}"


def test_answers_until_it_is_stopped():
    async def run() -> None:
        backend = Backend()
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        listener, url = await start(backend)
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        async with httpx.AsyncClient() as client:
            assert (await client.get(url)).text == "here"
        listener.check()
        await listener.stop()
        assert backend.ended.is_set()
        with pytest.raises(LongctxError, match="does not listen"):
            listener.check()
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ConnectError):
                await client.get(url)

    asyncio.run(run())


def test_a_request_that_does_not_finish_in_time_is_answered():
    async def run() -> None:
        backend = Backend()
        listener, url = await start(backend)
        async with httpx.AsyncClient() as client:
            asking = asyncio.create_task(client.get(url + "/wait", timeout=30))
            await backend.waiting.wait()
            await listener.stop()
            answer = await asking
        assert (answer.status_code, answer.text) == (503, "the server is stopping")

    asyncio.run(run())


def test_a_taken_port_is_named():
    async def run() -> None:
        listener, url = await start(Backend())
        port = int(url.rpartition(":")[2])
        backend = Backend()
        second = Listener(backend.app, ServerConfig(port=port), grace_s=0.2)
        with pytest.raises(ConfigError, match=rf"server\.port={port} cannot be listened on: Address already in use"):
            await second.start()
        with pytest.raises(LongctxError, match="does not listen"):
            second.check()
        await second.stop()
        await listener.stop()

    asyncio.run(run())
