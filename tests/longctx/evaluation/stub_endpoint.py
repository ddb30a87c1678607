"""An endpoint that answers as it is told: busy, dying, slow, or with something else than a completion."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, Any] | str, dict[str, str]]  # status, body, headers
MODELS = {"data": [{"id": "stub", "max_model_len": 5000}, {"id": "other"}]}
ERROR = {"error": {"message": "no room left"}}


@dataclass
class StubEndpoint:
    """What came, and what is answered."""

    url: str = ""
    reply: Callable[[int], Reply] = lambda number: complete("")
    delay_s: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def complete(text: str) -> Reply:
    """A completion and a chat's answer in one."""
    choice = {"text": text, "message": {"content": text}, "finish_reason": "stop"}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 7}}, {}


@contextmanager
def serve_stub() -> Iterator[StubEndpoint]:
    """An endpoint until the block ends."""
    stub = StubEndpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(200, MODELS, {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                stub.bodies.append(body | {"path": self.path})
                stub.keys.append(self.headers["Authorization"])
                number = len(stub.bodies)
            time.sleep(stub.delay_s)
            self._send(*stub.reply(number))

        def _send(self, status, body, headers):
            content = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
