"""When a request must be answered: after ``server.request_timeout_s``, or earlier if it says so."""

import asyncio
from types import TracebackType
from typing import Any, Self

from starlette.types import Scope

from cluster import fields
from cluster.fields import Reader
from cluster.openai_errors import ApiError, unavailable

HEADER = "x-request-timeout"
# The client has stopped to wait: its library must not ask again by itself, as it does after other 5xx.
NO_RETRY = {"x-should-retry": "false"}


def timeout_reader(longest_s: float) -> Reader:
    """Of what a request may ask for."""
    return fields.number(0.0, longest_s, above=True)


class Deadline:
    """Ends the block that it is entered for with ``TimeoutError``; time counts from construction.

    Args:
        longest_s: what a request may ask for at most, and gets if it asks for nothing.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._asked_s: float | None = None
        self._began_s = asyncio.get_running_loop().time()
        self._timeout = asyncio.timeout_at(self._began_s + longest_s)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._timeout.__aexit__(kind, error, trace)

    def read_header(self, scope: Scope) -> None:
        """Take what the request's header says, if it has one; raises ``RequestError``."""
        given = dict(scope["headers"]).get(HEADER.encode())
        if given is None:
            return
        text = given.decode("latin-1")
        try:
            self._set(float(text), HEADER)
        except ValueError:  # a RequestError is one, and says the same of other numbers
            self._set(text, HEADER)

    def read_field(self, body: dict[str, Any]) -> None:
        """Take what the request's field says, if it has one; raises ``RequestError``."""
        if body.get("timeout") is not None:
            self._set(body["timeout"], "timeout")

    def explain(self, error: Exception) -> ApiError | None:
        """The answer, if ``error`` is this deadline's."""
        if not (self._timeout.expired() and isinstance(error, TimeoutError)):
            return None
        if self._asked_s is None:
            text = f"the request took more than {self._longest_s:g} seconds (server.request_timeout_s)"
            return unavailable(text, code="timeout")
        text = f"the request took more than the {self._asked_s:g} seconds that it gave (timeout)"
        return ApiError(504, text, kind="timeout_error", code="deadline_exceeded", headers=NO_RETRY)

    def _set(self, value: Any, name: str) -> None:
        asked_s: float = timeout_reader(self._longest_s)(value, name)
        self._asked_s = asked_s
        self._timeout.reschedule(self._began_s + asked_s)
