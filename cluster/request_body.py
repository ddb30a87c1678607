"""Reads a request's body within limits, and its JSON. Nothing of an over-long body is kept."""

import asyncio
import json
from typing import Any

from starlette.types import Receive, Scope

from cluster.connection import ClientGoneError
from cluster.openai_errors import ApiError
from longctx.errors import RequestError

IDLE_TIMEOUT_S = 30.0  # a sender that is silent for longer is given up
LINGER_S = 2.0  # how long the rest of a refused body is discarded, so that the client gets to read the answer
_MOST_DIGITS = 20  # of a length; not every HTTP server refuses more, and Python reads no more than 4300
SMALL_BODY_BYTES = 1 << 16  # larger ones are parsed on a thread


async def read_json(scope: Scope, receive: Receive, *, max_bytes: int) -> dict[str, Any]:
    """The body's JSON object; raises ``ApiError`` (413, 408), ``RequestError`` (400) or ``ClientGoneError``."""
    body = await read_body(scope, receive, max_bytes=max_bytes)
    if len(body) > SMALL_BODY_BYTES:
        return await asyncio.to_thread(parse_json, body)
    return parse_json(body)


async def read_body(scope: Scope, receive: Receive, *, max_bytes: int) -> bytes:
    """The whole body. Bytes are counted as they come: a chunked body has no length to check first."""
    declared = dict(scope["headers"]).get(b"content-length", b"")
    if declared.isdigit() and (len(declared) > _MOST_DIGITS or int(declared) > max_bytes):
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    more = True
    while more:
        message = await _receive(receive)
        part = message.get("body", b"")
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


async def discard_body(receive: Receive) -> None:
    """Throw away what still comes, for a short while."""
    try:
        async with asyncio.timeout(LINGER_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
    except TimeoutError:
        return


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in ``body``; raises ``RequestError`` that says where the JSON is wrong."""
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise RequestError("the body is not usable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise RequestError(f"the body is not usable JSON: {error}") from None
    if not isinstance(content, dict):
        raise RequestError("the body must be a JSON object")
    return content


async def _receive(receive: Receive) -> Any:
    try:
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            message = await receive()
    except TimeoutError:
        text = f"the body did not arrive: nothing came for {IDLE_TIMEOUT_S:g} seconds"
        raise ApiError(408, text, code="timeout", body_unread=True) from None
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    return message


def _too_large(max_bytes: int) -> ApiError:
    text = f"the body is larger than the {max_bytes} bytes allowed (server.max_body_bytes)"
    return ApiError(413, text, code="body_too_large", body_unread=True)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON has")
