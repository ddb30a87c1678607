"""Network namespaces as hosts behind a switch with slowed-down ports, a real Ray on them, and a deployment.

Host 0 has Ray's head, the endpoint and the clients; the workers are on the others. What can be done to a host:

- ``cut``: its port at the switch passes nothing, either way; its own link stays up, and connections stay open;
- ``mute``: what it sends goes to an address that nobody has, what others send to it arrives (half-open).

What can be done to a worker: ``SIGKILL`` and ``SIGSTOP``. Needs root, ``ip`` and ``tc``.
"""

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.networks import Network, make_network, run
from cluster.serve_app import ENDPOINT_FOLDER
from tests.cli_server import CliServer, launch, wait_until
from tests.ray_nodes import RayNodes, start_nodes

NOBODY = "02:00:00:00:00:99"  # a hardware address
_CLONE_NEWNET = 0x40000000
PORT = 8000


@dataclass
class Hosts:
    """A deployment on several hosts."""

    network: Network
    cluster: RayNodes
    server: CliServer

    def run(self, function: Callable[[], Any]) -> Any:
        """Call it in a thread on host 0, where the endpoint is; its connections are that host's."""
        return call_inside(self.network.names[0], function)

    def status(self) -> dict[str, Any]:
        """``/status``."""
        return self.run(lambda: httpx.get(self.server.url + "/status", timeout=30).raise_for_status().json())

    def worker(self, name: str) -> dict[str, Any]:
        """One worker of ``/status``."""
        return next(worker for worker in self.status()["workers"] if worker["name"] == name)

    def host_of(self, name: str) -> int:
        """Which host a worker is on."""
        inodes = [os.stat(f"/run/netns/{each}").st_ino for each in self.network.names]
        return inodes.index(os.stat(f"/proc/{self.worker(name)['pid']}/ns/net").st_ino)

    def cut(self, host: int) -> None:
        """Nothing passes to or from it."""
        self._set_port(host, "disabled")

    def mute(self, host: int) -> None:
        """Nothing that it sends arrives."""
        self._point_neighbours(host, NOBODY)

    def heal(self, host: int) -> None:
        """Undo ``cut`` and ``mute``."""
        self._set_port(host, "forwarding")
        self._point_neighbours(host, None)

    def find(self, title: str) -> int:
        """Process id of Ray's process on host 0 whose title begins so; the one that serves, if there are several."""
        children = psutil.Process(self.cluster.nodes[0].process.pid).children(recursive=True)
        found = [each.pid for each in children if " ".join(each.cmdline()).startswith(title)]
        if len(found) > 1:
            turns = ENDPOINT_FOLDER.glob("longctx-endpoint-*.turn")
            holders = {int.from_bytes(path.read_bytes()[:8], "little") for path in turns}
            found = [pid for pid in found if pid in holders]
        [only] = found
        return only

    def is_idle(self) -> bool:
        """Every worker is there, nothing runs, waits or holds a page."""
        status = self.status()
        engines = [worker["engine"] for worker in status["workers"]]
        fields = ("num_running", "num_waiting", "num_pages_used")
        return (
            status["requests_in_progress"] == 0
            and all(worker["alive"] for worker in status["workers"])
            and not any(engine[name] for engine in engines for name in fields)
        )

    def _set_port(self, host: int, state: str) -> None:
        switch = self.network.names[0].rpartition("-")[0] + "-switch"
        run("bridge", "-n", switch, "link", "set", "dev", f"port{host}", "state", state)

    def _point_neighbours(self, host: int, hardware: str | None) -> None:
        for peer in range(len(self.network.names)):
            words = ["ip", "-n", self.network.names[host], "neighbour"]
            where = [self.network.address(peer), "dev", "link0"]
            if peer == host:
                continue
            if hardware is None:
                subprocess.run([*words, "delete", *where], check=False, capture_output=True)
            else:
                run(*words, "replace", *where, "lladdr", hardware, "nud", "permanent")


@contextmanager
def start_hosts(folder: Path, *overrides: str, num_hosts: int = 4, mbit: float = 1000) -> Iterator[Hosts]:
    """Hosts of two CPUs each with a deployment in fp32, ready; gone when the block ends."""
    with ExitStack() as stack:
        network = stack.enter_context(make_network(num_hosts, "switch", mbit))
        cluster = stack.enter_context(start_nodes(folder, 2, network=network))
        keys = [f"ray.address={cluster.address}", "model.dtype=float32", "server=public", *overrides]
        server = stack.enter_context(
            launch(folder, *keys, env=cluster.env, port=PORT, prefix=tuple(network.command(0)))
        )
        hosts = Hosts(network, cluster, server)

        def is_ready() -> bool:
            assert server.process.poll() is None, server.output()
            try:
                return hosts.run(lambda: httpx.get(server.url + "/health", timeout=10).status_code == 200)
            except httpx.HTTPError:
                return False

        wait_until(is_ready, 300, server.output)
        yield hosts


def call_inside(namespace: str, function: Callable[[], Any]) -> Any:
    """Call it in a thread of a network namespace, and return or raise what it does."""
    done: list[Any] = []

    def run_there() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{namespace}") as file:
            if libc.setns(file.fileno(), _CLONE_NEWNET):
                done.append(OSError(ctypes.get_errno(), f"namespace {namespace} cannot be entered"))
                return
        try:
            done.append(function())
        except BaseException as error:
            done.append(error)

    thread = threading.Thread(target=run_there)
    thread.start()
    thread.join()
    if isinstance(done[0], BaseException):
        raise done[0]
    return done[0]


def names_of(status: dict[str, Any], role: str) -> Sequence[str]:
    """Workers of a role."""
    return [worker["name"] for worker in status["workers"] if worker["role"] == role]
