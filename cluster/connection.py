"""Ends work for a client that is gone.

The server says so only to who asks (`receive`): while an answer is being made, a task asks.
"""

import asyncio
from collections.abc import Callable, Coroutine

from starlette.types import Receive


class ClientGoneError(Exception):
    """The client closed the connection before it had its answer."""


async def run_while_connected(
    work: Coroutine[None, None, None], receive: Receive, *, answered: Callable[[], bool]
) -> None:
    """Run ``work``; when the client disconnects first, cancel it and raise ``ClientGoneError``.

    Args:
        work: makes and sends the answer.
        receive: of a request whose body was read.
        answered: whether the whole answer was sent, after which the server reports a disconnect too.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done() and not answered():
            raise ClientGoneError
        await worker
    finally:
        watcher.cancel()
        worker.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
