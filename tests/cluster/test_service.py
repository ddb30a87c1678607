"""The endpoint as Serve starts it from a configuration file, as KubeRay's RayService does, in a real Ray cluster."""

import os
import subprocess
import sys

import httpx
import pytest
import yaml

from tests.cli_server import free_port, wait_until
from tests.ray_nodes import start_nodes

pytestmark = pytest.mark.slow

ENTRY = "from ray.serve.scripts import cli; cli()"
OVERRIDES = [
    "cluster=elastic",
    "engine.kv_bytes=64MiB",
    "engine.num_threads=1",
    "cluster.worker_cpus=0.1",
    "model.dtype=float32",
]


def test_serve_starts_it_and_takes_it_away(tmp_path):
    port = free_port()
    with start_nodes(tmp_path, 2, has_jobs=True) as cluster:
        file = tmp_path / "serve.yaml"
        application = {
            "name": "longctx",
            "route_prefix": "/",
            "import_path": "cluster.service:build",
            "args": {"overrides": OVERRIDES},
            "runtime_env": {"env_vars": {"PYTHONPATH": os.getcwd()}},
        }
        options = {"host": "127.0.0.1", "port": port}
        file.write_text(yaml.safe_dump({"http_options": options, "applications": [application]}))
        address = f"--address={cluster.job_address}"

        def run_serve(*words):
            done = subprocess.run(
                [sys.executable, "-c", ENTRY, *words],
                env=os.environ | cluster.env,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        run_serve("deploy", str(file), address)
        url = f"http://127.0.0.1:{port}"

        def is_ready():
            try:
                return httpx.get(f"{url}/health", timeout=10).status_code == 200
            except httpx.HTTPError:
                return False

        wait_until(is_ready, 240, lambda: run_serve("status", address))
        body = {"model": "demo", "prompt": "import os\n" * 100, "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 8
        workers = httpx.get(f"{url}/status", timeout=10).json()["workers"]
        assert [worker["name"] for worker in workers] == ["prefill-0", "decode-0"]
        wait_until(
            lambda: (
                [pool["target_workers"] for pool in httpx.get(f"{url}/status", timeout=10).json()["pools"]] == [1, 1]
            )
        )
        pids = [worker["pid"] for worker in workers]
        assert all(os.path.exists(f"/proc/{pid}") for pid in pids)
        run_serve("shutdown", "--yes", address)
        wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 60)
