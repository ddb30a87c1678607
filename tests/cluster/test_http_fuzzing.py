"""Whatever comes over a connection is answered or closed, never with a 500 or a traceback; the next is served."""

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from hypothesis import strategies as st

from cluster.config import ServerConfig
from cluster.endpoint import make_app
from cluster.listener import Listener
from cluster.local_backend import LocalBackend
from cluster.openai_schema import HARMLESS, chat_readers, completion_readers
from cluster.serving import ServedModel, describe_model
from longctx.engine.build import build_engine
from longctx.engine.config import EngineConfig
from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.config import ModelConfig
from tests.cli_server import free_port
from tests.fuzzing import MANY, QUICK, fuzz, hang_up
from tests.local_server import MODEL_NAME
from tests.tiny_checkpoints import make_checkpoint

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PATHS = [COMPLETIONS, CHAT, "/v1/models", "/v1/models/x", "/health", "/metrics", "/status", "/openapi.json", "/"]
PROMPT = {"model": MODEL_NAME, "prompt": "The sky is", "max_tokens": 2}
TALK = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
WAIT_S = 20.0  # longer than anything here takes
FORESEEN = {200, 400, 404, 405, 408, 413, 429}  # 503 would say that something was not


@dataclass(frozen=True, slots=True)
class Server:
    """An endpoint that listens as ``longctx serve`` does."""

    port: int
    records: list[logging.LogRecord]  # everything that was logged

    def exchange(self, data: bytes) -> bytes:
        """What is answered on a connection that ends after ``data``."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S) as connection:
            received = b""
            with suppress(ConnectionError):  # what was not read yet is refused with a reset
                connection.sendall(data)
                hang_up(connection)
                while part := connection.recv(1 << 16):
                    received += part
            return received


class Keeper(logging.Handler):
    """Keeps records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def listen(app: Any) -> Iterator[int]:
    """The application's port while it is served by ``Listener``, on a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = ServerConfig(port=free_port())

    def run(step: Callable[[], Any]) -> None:
        asyncio.run_coroutine_threadsafe(step(), loop).result(WAIT_S)

    async def make() -> Listener:
        return Listener(app, server, grace_s=1.0)

    listener = asyncio.run_coroutine_threadsafe(make(), loop).result(WAIT_S)
    run(listener.start)
    try:
        yield server.port
    finally:
        run(listener.stop)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", seed=3)
    model = ModelConfig(path=str(folder), name=MODEL_NAME, attention="torch")
    engine = build_engine(model, EngineConfig(kv_bytes="64KiB", page_size=16, num_threads=1))
    backend = LocalBackend(engine, describe_model(inspect_checkpoint(folder), model), tokenizer=engine.tokenizer)
    keeper = Keeper()
    logging.getLogger().addHandler(keeper)
    try:
        with listen(make_app(backend, ServerConfig(max_body_bytes="256KiB"))) as port:
            yield Server(port, keeper.records)
    finally:
        logging.getLogger().removeHandler(keeper)


@pytest.fixture
def check_quiet(server) -> Iterator[None]:
    """Nobody logs a traceback or an error; the next request is served."""
    server.records.clear()
    yield
    assert [each.getMessage() for each in server.records if each.exc_info or each.levelno >= logging.ERROR] == []
    answer = httpx.post(f"http://127.0.0.1:{server.port}{COMPLETIONS}", json=PROMPT, timeout=WAIT_S)
    assert answer.status_code == 200


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """What looks like a request, with something wrong here and there."""
    token = st.text(st.characters(codec="latin-1"), max_size=8).map(lambda text: text.encode("latin-1"))
    method = draw(st.sampled_from([b"GET", b"POST", b"HEAD", b"OPTIONS", b"CONNECT", b"PRI"]) | token)
    path = draw(st.sampled_from([path.encode() for path in PATHS]) | token.map(lambda part: b"/" + part))
    version = draw(st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b""]))
    body = draw(bodies())
    headers = draw(st.lists(st.one_of(HEADERS, st.tuples(token, token)), max_size=4))
    if draw(st.booleans()):
        headers.append((b"content-length", str(len(body)).encode()))
    if draw(st.booleans()):
        headers.append((b"transfer-encoding", b"chunked"))
        sizes = st.sampled_from([f"{len(body):x}".encode(), b"0", b"-1", b"ffffffffffffffff", b"f" * 5000, b"", b"1;a"])
        body = draw(sizes) + b"\r\n" + body + b"\r\n" + draw(st.sampled_from([b"0\r\n\r\n", b"0\r\na: b\r\n\r\n", b""]))
    end = draw(st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"]))
    head = b" ".join([method, path, version]) + end + b"".join(name + b": " + value + end for name, value in headers)
    data = head + end + body
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 4)) == 0 else data


def bodies() -> st.SearchStrategy[bytes]:
    """Of requests, right and wrong."""
    right = json.dumps(PROMPT).encode()
    return st.sampled_from([b"", right, right[:-1], json.dumps(TALK).encode(), b"[" * 10_000]) | st.binary(max_size=64)


HEADERS = st.sampled_from(
    [
        (b"host", b"x"),
        (b"content-length", b"-1"),
        (b"content-length", b"9" * 5000),
        (b"content-length", b"18446744073709551616"),
        (b"content-length", b"1, 1"),
        (b"content-length", "²".encode("latin-1")),
        (b"transfer-encoding", b"gzip, chunked"),
        (b"transfer-encoding", b"identity"),
        (b"connection", b"close"),
        (b"connection", b"upgrade"),
        (b"upgrade", b"websocket"),
        (b"upgrade", b"h2c"),
        (b"expect", b"100-continue"),
        (b"x-request-timeout", b"nan"),
        (b"x-request-timeout", b"9" * 5000),
        (b"authorization", b"Bearer \xff"),
        (b"content-type", b"text/plain; charset=\xff"),
        (b"content-encoding", b"gzip"),
        (b"a", b"x" * 70_000),
    ]
)


def statuses(answer: bytes) -> set[int]:
    """Of the responses in ``answer``."""
    return {int(line[9:12]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")}


def check_bytes(server: Server, *, num_examples: int) -> None:
    def check(data: bytes) -> None:
        answer = server.exchange(data)
        assert statuses(answer) <= FORESEEN, answer

    fuzz(
        st.binary(max_size=200) | requests() | st.lists(requests(), max_size=3).map(b"".join),
        check,
        num_examples=num_examples,
    )


def test_bytes(server, check_quiet) -> None:
    check_bytes(server, num_examples=QUICK)


@pytest.mark.slow
def test_many_bytes(server, check_quiet) -> None:
    check_bytes(server, num_examples=MANY)


NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400, -(10**4000)]),
    st.floats(allow_nan=False, allow_infinity=False),
)
TEXTS = st.sampled_from(["", "a", "\x00", "\ud800", "\U0001f600", "user", "assistant", "text", "x" * 70_000]) | st.text(
    max_size=8
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
MODEL = ServedModel(MODEL_NAME, created=0, max_context=128, vocab_size=260)
NAMES = st.sampled_from(
    ["prompt", "messages", *sorted(completion_readers(MODEL) | chat_readers(MODEL)), *sorted(HARMLESS)]
)
TEMPLATE_KWARGS = st.sampled_from(
    ["add_generation_prompt", "continue_final_message", "padding", "bos_token", "raise_exception", "messages", "range"]
)
CHANGES = st.dictionaries(NAMES | TEXTS, JSON, max_size=3) | st.fixed_dictionaries(
    {"chat_template_kwargs": st.dictionaries(TEMPLATE_KWARGS | TEXTS, JSON, max_size=2)}
)


def check_bodies(server: Server, *, num_examples: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=WAIT_S) as client:

        def check(request: tuple[str, Any]) -> None:
            path, content = request
            response = client.post(path, content=json.dumps(content))
            assert response.status_code in FORESEEN, response.text
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
                assert len(response.content) < 4096

        changed = st.sampled_from([(COMPLETIONS, PROMPT), (CHAT, TALK)]).flatmap(
            lambda base: st.tuples(st.just(base[0]), CHANGES.map(lambda changes: base[1] | changes))
        )
        fuzz(changed | st.tuples(st.sampled_from([COMPLETIONS, CHAT]), JSON), check, num_examples=num_examples)


def test_bodies(server, check_quiet) -> None:
    check_bodies(server, num_examples=2 * QUICK)


@pytest.mark.slow
def test_many_bodies(server, check_quiet) -> None:
    check_bodies(server, num_examples=MANY)
