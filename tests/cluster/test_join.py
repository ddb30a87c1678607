"""``longctx serve ray.address=...``: a Ray cluster that runs already is joined, used and left as it was."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.certificates import make_certificate
from tests.cli_server import CliServer, free_port, launch, run_longctx, wait_until

pytestmark = pytest.mark.slow

ASK = """
import ray
from ray import serve
ray.init(address={address!r}, log_to_driver=False, logging_level="error")
print(ray.util.list_named_actors(all_namespaces=True), serve.status().applications, ray.available_resources()["CPU"])
"""
EMPTY = "[] {} 2.0"


@dataclass
class Cluster:
    """A Ray cluster of one node that was started by ``ray start``."""

    address: str
    env: dict[str, str]

    def describe(self) -> str:
        """Named actors, Serve applications and free CPUs, as a program sees them that joins."""
        script = ASK.format(address=self.address)
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | self.env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = Path("/tmp") / f"longctx-test-{os.getpid()}"  # short: Unix socket names are
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    port = free_port()
    options = {
        "port": port,
        "num-cpus": 2,
        "object-store-memory": 100_000_000,
        "include-dashboard": "false",
        "temp-dir": folder,
        "ray-client-server-port": free_port(),
        "dashboard-agent-listen-port": free_port(),
        "dashboard-agent-grpc-port": free_port(),
        "metrics-export-port": free_port(),
    }
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    log = tmp_path_factory.mktemp("ray") / "ray.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*words, *(f"--{name}={value}" for name, value in options.items())],
            env=os.environ | env,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: process.poll() is not None or "Ray runtime started" in log.read_text(), 120, log.read_text)
        assert process.poll() is None, log.read_text()
        yield Cluster(f"127.0.0.1:{port}", env)
        assert process.poll() is None  # it outlived everybody
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        psutil.wait_procs(family, 20)
        for each in family:
            if each.is_running():
                each.kill()
        process.wait(30)
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def check_nothing_is_left(server: CliServer, cluster: Cluster) -> None:
    wait_until(lambda: not server.left_behind(), 10.0, server.left_behind)
    wait_until(lambda: cluster.describe() == EMPTY, 60, cluster.describe)


def test_joins_serves_and_leaves(tmp_path, cluster):
    assert cluster.describe() == EMPTY
    with launch(tmp_path, f"ray.address={cluster.address}", env=cluster.env) as server:
        server.wait_until_ready()
        response = server.post("/v1/completions", prompt="import os\n" * 100, max_tokens=4)
        assert response.status_code == 200, response.text
        done = run_longctx("status", f"server.port={server.port}")
        assert done.returncode == 0, done.stderr
        assert "prefill-0" in done.stdout
        assert "decode-0" in cluster.describe()
        assert server.stop(signal.SIGTERM) == 0
        assert "Traceback" not in server.output()
        check_nothing_is_left(server, cluster)


def test_https_through_serves_proxy(tmp_path, cluster):
    made = make_certificate(tmp_path / "tls", "127.0.0.1")
    address = f"ray.address={cluster.address}"
    own = (*made.overrides, "server.proxy=true")
    with launch(tmp_path, address, *own, env=cluster.env, ca=made.certificate) as server:
        server.wait_until_ready()
        assert server.post("/v1/completions", prompt="import ", max_tokens=4).status_code == 200
        beside = run_longctx("serve", address, f"server.port={server.port}", "ray.namespace=other", env=cluster.env)
        assert beside.returncode == 2
        assert f"use server.tls_certificate={made.certificate} server.tls_key={made.key}" in beside.stderr
        assert server.stop() == 0
        check_nothing_is_left(server, cluster)


def test_a_namespace_is_used_once(tmp_path, cluster):
    """A second deployment beside the first is refused with what to change, and does the first no harm."""
    with launch(tmp_path, f"ray.address={cluster.address}", env=cluster.env) as server:
        server.wait_until_ready()
        address = f"ray.address={cluster.address}"
        for port in (free_port(), server.port):
            beside = run_longctx("serve", address, f"server.port={port}", env=cluster.env)
            assert beside.returncode == 2
            assert "ray.namespace='longctx' is in use" in beside.stderr
        other = run_longctx("serve", address, f"server.port={server.port}", "ray.namespace=other", env=cluster.env)
        assert other.returncode == 2
        assert f"server.port={server.port} cannot be listened on" in other.stderr
        assert server.post("/v1/completions", prompt="import ", max_tokens=4).status_code == 200
        assert server.stop() == 0
        check_nothing_is_left(server, cluster)


def test_a_killed_command_is_replaced(tmp_path, cluster):
    """SIGKILL leaves the endpoint in the cluster, which the next start takes over and takes away."""
    with launch(tmp_path, f"ray.address={cluster.address}", env=cluster.env) as killed:
        killed.wait_until_ready()
        assert killed.stop(signal.SIGKILL) == -signal.SIGKILL
        wait_until(lambda: httpx.get(killed.url + "/health").status_code == 503, 60)  # its workers end with it
        with launch(tmp_path, f"ray.address={cluster.address}", env=cluster.env, port=killed.port) as server:
            server.wait_until_ready()
            assert server.post("/v1/completions", prompt="import os\n" * 100, max_tokens=4).status_code == 200
            assert server.stop() == 0
            check_nothing_is_left(server, cluster)


def test_behind_a_proxy_that_listens(tmp_path, cluster):
    """Who finds Serve's proxy goes through it, where it is."""
    address = f"ray.address={cluster.address}"
    with launch(tmp_path, address, "server.proxy=true", env=cluster.env) as server:
        server.wait_until_ready()
        elsewhere = run_longctx("serve", address, f"server.port={free_port()}", "ray.namespace=b", env=cluster.env)
        assert elsewhere.returncode == 2
        assert f"use server.host=127.0.0.1 server.port={server.port}" in elsewhere.stderr
        assert server.stop() == 0
        check_nothing_is_left(server, cluster)


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}, "the cluster refuses this token"),
        ({"RAY_AUTH_MODE": "disabled"}, "the cluster refuses this token, or its lack"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "", "HOME": "/absent"},
            "RAY_AUTH_MODE=token, and no token is found",
        ),
    ],
    ids=["wrong", "none sent", "none found"],
)
def test_tokens_are_checked(cluster, env, reason):
    done = run_longctx("serve", f"ray.address={cluster.address}", f"server.port={free_port()}", env=env)
    assert done.returncode == 2
    assert f"ray.address='{cluster.address}' cannot be joined: {reason}" in done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_said(cluster):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ("serve", f"ray.address={cluster.address}", f"server.port={taken.getsockname()[1]}")
        done = run_longctx(*words, env=cluster.env)
    assert done.returncode == 2
    assert "cannot be listened on" in done.stderr
    assert cluster.describe() == EMPTY
