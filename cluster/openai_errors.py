"""Every failure as the OpenAI API says it: a status and ``{"error": {message, type, param, code}}``.

No exception leaves the endpoint as a 500: what nobody foresaw is logged and answered 503, so that clients try again.
"""

import json
import logging
import math
from typing import Any

from starlette.responses import Response

from cluster.serving import NotReadyError
from longctx.errors import QueueFullError, RequestError, WorkerLostError

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
RETRY_AFTER_S = 1.0


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: HTTP status.
        message: what is wrong and what is allowed.
        kind: the error object's ``type``.
        param: the request field at fault.
        code: a short machine-readable code.
        headers: further response headers.
        body_unread: part of the request's body was left; the connection cannot go on.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        body_unread: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.body_unread = body_unread
        if body_unread:
            self.headers["connection"] = "close"

    def to_json(self) -> bytes:
        """The error object; ASCII, so that any text a client sent can be quoted."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def to_response(self) -> Response:
        """The whole HTTP response."""
        return Response(self.to_json(), self.status, self.headers, "application/json")


def to_api_error(error: Exception) -> ApiError:
    """``error`` as clients see it; logs what was not foreseen."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case QueueFullError():
            return busy(str(error), retry_after_s=error.retry_after_s)
        case NotReadyError():
            return unavailable(str(error), code="not_ready")
        case WorkerLostError():
            return unavailable(str(error), code="worker_lost")
        case TimeoutError():
            return unavailable(str(error) or "the request took too long", code="timeout")
    logger.error("a request failed", exc_info=error)
    return unavailable("the server failed to answer; its log says why", code="internal_error")


def busy(message: str, *, code: str = "queue_full", retry_after_s: float = RETRY_AFTER_S) -> ApiError:
    """429: try again later."""
    headers = {"retry-after": str(max(1, math.ceil(retry_after_s)))}
    return ApiError(429, message, kind="rate_limit_error", code=code, headers=headers)


def unavailable(message: str, *, code: str) -> ApiError:
    """503: not this request's fault."""
    return ApiError(503, message, kind=SERVER_ERROR, code=code, headers={"retry-after": str(math.ceil(RETRY_AFTER_S))})


def http_error(status: int, *, method: str, path: str) -> ApiError:
    """What the routing table refuses: an unknown path, a method a path does not take."""
    if status == 404:
        return ApiError(404, f"there is no {path}; the API is under /v1", code="unknown_url")
    if status == 405:
        return ApiError(405, f"{method} is not allowed for {path}", code="method_not_allowed")
    return ApiError(status, f"{method} {path} cannot be answered")


def json_response(content: Any, status: int = 200) -> Response:
    """``content`` as an ASCII JSON response."""
    return Response(json.dumps(content, separators=(",", ":")).encode(), status, media_type="application/json")
