"""Sends one HTTP answer: whole, or as server-sent events, and an error in whichever way is still possible."""

import asyncio
import logging

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.answers import DONE, AnswerFormat, Choice
from cluster.generation import Generation
from cluster.openai_errors import ApiError, json_response
from cluster.request_body import discard_body

logger = logging.getLogger(__name__)

ACCEPT_S = 1.0  # how long a stream's first output or refusal is waited for before the status 200 is sent
KEEP_ALIVE_S = 10.0  # silence after which a comment is sent, so that proxies keep the connection
FAIL_S = 5.0  # how long a client that may not be reading is given to take an error
KEEP_ALIVE = b": waiting\n\n"
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # or nginx holds events back
}


class Answer:
    """What is sent for one request.

    Args:
        scope, receive, send: of the ASGI request.
        request_id: sent as ``x-request-id``.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, request_id: str) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._headers = {"x-request-id": request_id}
        self.started = False  # the status is sent
        self.ended = False  # the last byte is being sent

    async def respond(self, response: Response) -> None:
        """Send a whole answer."""
        self.started = self.ended = True
        response.headers.update(self._headers)
        await response(self._scope, self._receive, self._send)

    async def write(self, events: bytes) -> None:
        """Send events; waits while the client does not read."""
        if not self.started:
            self.started = True
            headers = [(name.encode(), value.encode()) for name, value in (STREAM_HEADERS | self._headers).items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end(self, events: bytes) -> None:
        """Send the last events and end the stream."""
        self.ended = True
        await self.write(events)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: ApiError) -> None:
        """Say what went wrong: with its status, or once that is sent, as an event after which the stream ends."""
        if self.ended:
            return
        try:
            async with asyncio.timeout(FAIL_S):
                await self._fail(error)
        except TimeoutError:
            # Not the error's text, which may quote the request.
            told = error.code or error.param or error.kind
            logger.info("%s: the client does not read; it was not told: %s", self._headers["x-request-id"], told)

    async def _fail(self, error: ApiError) -> None:
        if self.started:
            await self.end(b"data: " + error.to_json() + b"\n\n")
        elif error.body_unread:
            await self._refuse_body(error)
        else:
            await self.respond(error.to_response())

    async def _refuse_body(self, error: ApiError) -> None:
        """Answer while the client still sends, and close. Closing at once would lose the answer in a reset."""
        self.started = self.ended = True
        content = error.to_json()
        fields = (
            self._headers | error.headers | {"content-type": "application/json", "content-length": str(len(content))}
        )
        headers = [(name.encode(), value.encode()) for name, value in fields.items()]
        await self._send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": content, "more_body": True})
        await discard_body(self._receive)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def stream_answer(answer: Answer, generation: Generation, form: AnswerFormat, *, include_usage: bool) -> None:
    """Send events as output comes. What came together, or while the client did not read, is sent together."""
    deltas = await generation.take(ACCEPT_S)
    opened: set[int] = set()
    if not deltas:
        opened.update(range(generation.num_choices))
        await answer.write(b"".join(map(form.open, range(generation.num_choices))) or KEEP_ALIVE)
    while True:
        parts: list[bytes] = []
        for choice_idx, delta in deltas:
            if choice_idx not in opened:
                opened.add(choice_idx)
                parts.append(form.open(choice_idx))
            parts.append(form.events(choice_idx, delta))
        if not generation.num_unfinished:
            break
        if events := b"".join(parts):
            await answer.write(events)
        deltas = await generation.take(KEEP_ALIVE_S)
        if not deltas:
            await answer.write(KEEP_ALIVE)
    if include_usage:
        parts.append(form.usage_event(generation.usage()))
    await answer.end(b"".join(parts) + DONE)


async def whole_answer(generation: Generation, form: AnswerFormat) -> Response:
    """Wait for every sequence and make the answer."""
    choices = [Choice() for _ in range(generation.num_choices)]
    while generation.num_unfinished:
        for choice_idx, delta in await generation.take():
            choices[choice_idx].add(delta)
    return json_response(form.whole(choices, generation.usage()))
