"""A real Ray cluster by ``ray start``, with a token: one node here, or one in each namespace of a network."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.networks import Network
from tests.cli_server import free_port, wait_until

START_TIMEOUT_S = 180.0
RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")
STORE_BYTES = 100_000_000


@dataclass
class RayNode:
    """One node, with all the processes of it."""

    process: subprocess.Popen[bytes]
    log: Path

    def is_up(self) -> bool:
        """Whether it has started; fails with what it printed if it has ended."""
        assert self.process.poll() is None, self.log.read_text()
        return "Ray runtime started" in self.log.read_text()

    def kill(self) -> None:
        """SIGKILL to all of it at once, as when a machine fails."""
        family = [psutil.Process(self.process.pid)] if self.process.poll() is None else []
        family += [child for parent in family for child in parent.children(recursive=True)]
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, 20)
        self.process.wait(20)


@dataclass
class RayNodes:
    """The cluster: its address, the job server's, and what a process needs in its environment to join."""

    address: str
    job_address: str
    env: dict[str, str]
    nodes: list[RayNode] = field(default_factory=list)


@contextmanager
def start_nodes(
    folder: Path, num_cpus: int, *, network: Network | None = None, has_jobs: bool = False
) -> Iterator[RayNodes]:
    """A cluster until the block ends.

    Args:
        folder: for its output.
        num_cpus: of each node.
        network: a node in each of its namespaces; None: one node on this machine.
        has_jobs: with the dashboard, which is the job server.
    """
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    places = range(len(network.names)) if network else [0]
    host = network.address(0) if network else "127.0.0.1"
    port, job_port = (6379, 8265) if network else (free_port(), free_port())
    cluster = RayNodes(f"{host}:{port}", f"http://{host}:{job_port}", env)
    temp = Path("/tmp") / f"lcx-ray-{os.getpid()}"  # short: Unix socket names are
    try:
        for place in places:
            options = {"num-cpus": num_cpus, "object-store-memory": STORE_BYTES, "temp-dir": temp / str(place)}
            options["node-ip-address"] = network.address(place) if network else host
            if place:
                options["address"] = cluster.address
            else:
                options |= {"port": port, "include-dashboard": str(has_jobs).lower(), "dashboard-host": host}
                options |= {"dashboard-port": job_port, "ray-client-server-port": free_port()}
            if not network:
                for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"):
                    options[name] = free_port()
            log = folder / f"node-{place}.log"
            words = [*(network.command(place) if network else []), *RAY, *([] if place else ["--head"])]
            with log.open("wb") as sink:
                process = subprocess.Popen(
                    [*words, *(f"--{name}={value}" for name, value in options.items())],
                    env=os.environ | env,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            node = RayNode(process, log)
            cluster.nodes.append(node)
            wait_until(node.is_up, START_TIMEOUT_S, log.read_text)
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            node.kill()
        shutil.rmtree(temp, ignore_errors=True)
