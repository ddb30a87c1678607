"""``longctx status``: what it shows of a server that runs, and what it says of one that does not."""

import json
import time

from cluster.status import describe
from tests.cli_server import CliServer, free_port, run_longctx, wait_until

PROMPT = "def status(): pass\n" * 60  # long enough to be shipped


def ask_status(server: CliServer, *overrides: str) -> str:
    done = run_longctx("status", f"server.port={server.port}", f"server.api_keys=[{server.key}]", *overrides)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_shows_every_worker(served):
    assert served.post("/v1/completions", prompt=PROMPT, max_tokens=4).status_code == 200
    wait_until(lambda: served.worker("prefill-0")["bytes_shipped"] > 0)
    lines = ask_status(served).splitlines()
    assert lines[0].startswith("model demo, context ")
    assert lines[0].endswith("ready")
    assert lines[1] == "requests in progress 0 of at most 256"
    assert lines[2:4] == ["prefill pool: 1 workers", "decode pool: 1 workers"]
    head, *rows = lines[5:]
    for column in ("worker", "attention", "transport", "waiting", "pages used", "pages cached", "KV shipped"):
        assert column in head
    assert [row.split()[:4] for row in rows] == [[f"{role}-0", role, role, "alive"] for role in ("prefill", "decode")]
    pids = [str(served.worker(row.split()[0])["pid"]) for row in rows]
    for row, pid in zip(rows, pids, strict=True):
        assert pid in row.split()
        assert "float32" in row
    shipped = rows[0][head.index("KV shipped") :].split()
    assert float(shipped[0]) > 0
    assert shipped[1] in ("KiB", "MiB", "GiB")


def test_json_is_what_the_endpoint_says(served):
    wait_until(served.is_idle, 60, served.status)
    shown, told = json.loads(ask_status(served, "json=true")), served.status()
    assert [worker["name"] for worker in shown["workers"]] == ["prefill-0", "decode-0"]
    assert shown == told


def test_a_wrong_key_is_said(served):
    done = run_longctx("status", f"server.port={served.port}", "server.api_keys=[wrong]")
    assert done.returncode == 1
    assert "answers 401" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_file_will_do(served, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"{served.key}\n")
    done = run_longctx("status", f"server.port={served.port}", f"server.api_key_file={keys}")
    assert done.returncode == 0, done.stderr


def test_nothing_runs():
    port = free_port()
    done = run_longctx("status", f"server.port={port}")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"nothing of longctx answers at http://127.0.0.1:{port}" in done.stderr
    assert "is `longctx serve` running there?" in done.stderr
    assert "Traceback" not in done.stderr


def test_pools_that_scale():
    """How many there are and are to be, who is on his way, and why."""
    pool = {
        "role": "decode", "num_live": 1, "num_starting": 1, "num_draining": 0, "min_workers": 1, "max_workers": 4,
        "target_workers": 2, "starts": [{"name": "decode-1", "stage": "placing", "waited_s": 3.2}],
        "decision": "from 1 to 2 workers", "reason": "12 requests wait", "decided_at": time.time() - 4,
        "num_failed": 2, "retry_s": 0.0,
    }  # fmt: skip
    state = {
        "model": {"id": "demo", "max_model_len": 9}, "ready": True, "reason": "", "requests_in_progress": 9,
        "max_requests": 256, "workers": [], "autoscaler_silence_s": 1.0,
        "queue": {"num_waiting": 7, "num_for_prefill": 0, "num_for_decode": 5},
        "pools": [pool, pool | {"starts": [], "retry_s": 59.6, "decision": ""}],
    }  # fmt: skip
    lines = describe(state).splitlines()
    assert lines[2:5] == [
        "requests without a worker 7, 5 for decode workers",
        "decode pool: 1 workers of 2 (1 to 4), 1 starting; decode-1 waits for a place in the Ray cluster, 3 s; "
        "from 1 to 2 workers 4 s ago: 12 requests wait",
        "decode pool: 1 workers of 2 (1 to 4), 1 starting; 2 starts failed, the next is tried in 60 s at the earliest",
    ]
    silent = describe(state | {"autoscaler_silence_s": 45.0})
    assert "the autoscaler has said nothing for 45 s; pools stay as they are" in silent
