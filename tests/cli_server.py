"""``longctx serve`` as a user runs it: a process of its own, the demo model, a free port, and what it leaves behind."""

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

START_TIMEOUT_S = 240.0  # about 15 s on an idle machine
STOP_TIMEOUT_S = 60.0
ASK_TIMEOUT_S = 180.0
LONGCTX = (sys.executable, "-m", "longctx.cli.main")
SMALL = ("engine.kv_bytes=64MiB", "engine.num_threads=1", "cluster.worker_cpus=0.1", "server.standby=false")
SEGMENTS = Path("/dev/shm")


@dataclass
class CliServer:
    """A ``longctx serve`` that was started."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    key: str | None = None
    ca: str | None = None  # PEM file by which its certificate is verified; it speaks HTTPS then
    family: dict[int, psutil.Process] = field(default_factory=dict)  # every process of it that was ever seen

    @property
    def url(self) -> str:
        return f"{'https' if self.ca else 'http'}://127.0.0.1:{self.port}"

    @property
    def verify(self) -> ssl.SSLContext | bool:
        """For httpx."""
        return ssl.create_default_context(cafile=self.ca) if self.ca else True

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def output(self) -> str:
        """Everything it printed."""
        return self.log.read_text(errors="replace")

    def look(self) -> None:
        """Note its processes, while they can be found from their parent."""
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            self.family |= {each.pid: each for each in [parent, *parent.children(recursive=True)]}

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.output()
            with suppress(httpx.HTTPError):
                return httpx.get(self.url + "/health", timeout=10, verify=self.verify).status_code == 200
            return False

        wait_until(is_ready, START_TIMEOUT_S, self.output)
        wait_until(lambda: "ask it" in self.output(), 10.0, self.output)
        self.look()
        for worker in self.status()["workers"]:  # of a joined cluster, they are not our children
            self.family.setdefault(worker["pid"], psutil.Process(worker["pid"]))

    def stop(self, number: int = signal.SIGINT) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        self.look()
        self.process.send_signal(number)
        return self.process.wait(STOP_TIMEOUT_S)

    def post(self, path: str, **fields: Any) -> httpx.Response:
        """One request for the demo model."""
        body = {"model": "demo"} | fields
        return httpx.post(self.url + path, json=body, headers=self.headers, timeout=ASK_TIMEOUT_S, verify=self.verify)

    def status(self) -> dict[str, Any]:
        """``/status``."""
        response = httpx.get(self.url + "/status", headers=self.headers, timeout=30, verify=self.verify)
        return response.raise_for_status().json()

    def worker(self, name: str) -> dict[str, Any]:
        """One worker of ``/status``."""
        return next(worker for worker in self.status()["workers"] if worker["name"] == name)

    def is_idle(self) -> bool:
        """Nothing runs, waits or holds a page."""
        status = self.status()
        engines = [worker["engine"] for worker in status["workers"]]
        fields = ("num_running", "num_waiting", "num_pages_used")
        return status["requests_in_progress"] == 0 and not any(engine[name] for engine in engines for name in fields)

    def left_behind(self) -> list[str]:
        """What of it is still there: processes, segments, temporary folders, its port."""
        found = [f"process {each.pid} {each.name()}" for each in self.family.values() if _runs(each)]
        found += [str(path) for pid in self.family for path in SEGMENTS.glob(f"longctx-{pid}-*")]
        found += [str(path) for path in Path("/tmp").glob(f"longctx-ray-{self.process.pid}-*")]
        return found + ([f"port {self.port}"] if not _is_free(self.port) else [])


@contextmanager
def launch(
    folder: Path,
    *overrides: str,
    env: dict[str, str] | None = None,
    key: str | None = None,
    ca: str | None = None,
    port: int | None = None,
    prefix: tuple[str, ...] = (),
) -> Iterator[CliServer]:
    """Start ``longctx serve`` with small pools; kills what is left of it in the end.

    Args:
        folder: where its output is written.
        overrides: of the configuration.
        env: added to the environment.
        key: an API key that it takes.
        ca: PEM file by which its certificate is verified, if it is given one.
        port: to listen on; a free one otherwise.
        prefix: words before the command, as ``unshare``.
    """
    port = port or free_port()
    log = folder / f"serve-{port}-{time.monotonic_ns()}.log"
    words = [*prefix, *LONGCTX, "serve", f"server.port={port}", *SMALL, *overrides]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            words, stdout=sink, stderr=subprocess.STDOUT, env=os.environ | (env or {}), start_new_session=True
        )
    server = CliServer(process, port, log, key, ca)
    try:
        yield server
    finally:
        server.look()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
        for each in server.family.values():
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(STOP_TIMEOUT_S)


def run_longctx(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A ``longctx`` command that ends by itself."""
    return subprocess.run(
        [*LONGCTX, *words],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
        env=os.environ | (env or {}),
    )


def wait_until(
    condition: Callable[[], Any], timeout_s: float = 30.0, describe: Callable[[], object] = lambda: ""
) -> None:
    """Wait for ``condition``; fails with what ``describe`` says."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in {timeout_s:g} s: {describe()}"
        time.sleep(0.05)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def metric(text: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples that have ``labels``."""
    samples = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text, re.M)
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(value) for found, value in samples if all(label in found for label in wanted))


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
