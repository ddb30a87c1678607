"""A real HTTP server over one engine of this process, for tests: uvicorn on a free port, in a thread."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn

from cluster.config import ServerConfig
from cluster.endpoint import make_app
from cluster.local_backend import LocalBackend
from cluster.serving import describe_model
from longctx.attention.config import AttentionConfig
from longctx.engine.build import build_engine
from longctx.engine.config import EngineConfig
from longctx.engine.engine import Engine
from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.config import ModelConfig

START_TIMEOUT_S = 30.0
SEND_BUFFER_BYTES = 16384
MODEL_NAME = "tiny"


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A server that runs."""

    url: str  # without a path
    port: int
    engine: Engine


@contextmanager
def serve(
    folder: Path,
    *,
    engine: EngineConfig | None = None,
    server: ServerConfig | None = None,
    method: AttentionConfig | None = None,
) -> Iterator[LocalServer]:
    """Serve the checkpoint in ``folder`` as ``MODEL_NAME`` until the block ends."""
    model_config = ModelConfig(path=str(folder), name=MODEL_NAME, attention="torch")
    engine_config = engine or EngineConfig(kv_bytes="4MiB", page_size=16, num_threads=1)
    built = build_engine(model_config, engine_config, attention=method)
    backend = LocalBackend(built, describe_model(inspect_checkpoint(folder), model_config), tokenizer=built.tokenizer)
    with socket.socket() as listener:
        # Connections inherit it: a client that does not read is felt after kilobytes, not megabytes.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        app = make_app(backend, server or ServerConfig())
        runner = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            _wait_until(lambda: runner.started)
            yield LocalServer(f"http://127.0.0.1:{port}", port, built)
        finally:
            runner.should_exit = True
            thread.join(START_TIMEOUT_S)
            assert not thread.is_alive()


def check_error(response: httpx.Response, status: int, *, param: str | None = None, code: str | None = None) -> str:
    """The response is an error in the API's shape; returns its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"]
    return error["message"]


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
