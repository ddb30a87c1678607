"""API keys: who may ask."""

import hashlib
import hmac
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.config import ServerConfig
from cluster.openai_errors import ApiError
from longctx.errors import ConfigError

OPEN_PATHS = frozenset({"/health", "/metrics"})  # probes and scrapers carry no key


def load_keys(server: ServerConfig) -> tuple[str, ...]:
    """Keys of the configuration and of its key file; raises ``ConfigError`` if the file cannot be used."""
    keys = list(server.api_keys)
    if server.api_key_file is not None:
        lines = _read_lines(server.api_key_file)
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            # An empty file would else open the server to everybody.
            raise ConfigError(f"server.api_key_file={server.api_key_file!r} holds no key; one key per line is expected")
        keys += found
    if not all(isinstance(key, str) and key for key in keys):
        raise ConfigError("server.api_keys holds an empty key; allowed are non-empty strings")
    return tuple(keys)


class KeyCheck:
    """ASGI middleware that answers 401 to who has no key.

    Args:
        app: what it protects.
        keys: the keys accepted; with none, everybody may ask.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._find_problem(scope) if scope["type"] == "http" and scope["path"] not in OPEN_PATHS else ""
        if problem:
            error = ApiError(401, problem, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
            await error.to_response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _find_problem(self, scope: Scope) -> str:
        if not self._digests:
            return ""
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        if not header:
            return "an API key is missing; send it as Authorization: Bearer KEY"
        if scheme.lower() != b"bearer":
            return "the Authorization header must be Bearer KEY"
        # Every key is compared, as digests of one length: the time taken tells nothing of a key.
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return "" if any(matches) else "the API key is not known here"


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.api_key_file={path!r} cannot be read: {error}") from None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
