"""``longctx status``: asks the endpoint what runs where, and prints it."""

import json
import sys
import time
from typing import Any

import httpx

from cluster.config import ROLES, StatusConfig
from cluster.key_ring import pick_key
from cluster.tls import client_context
from longctx.errors import LongctxError

TIMEOUT_S = 10.0
SILENCE_S = 30.0  # of the autoscaler, which speaks every cluster.autoscale.interval_s
_COLUMNS = (
    "worker", "role", "pool", "state", "host", "pid", "ranks", "device", "dtype", "attention", "transport",
    "running", "waiting", "pages used", "pages cached", "pages", "KV shipped", "preempted",
)  # fmt: skip


def status(config: StatusConfig) -> int:
    """Print the state; returns the exit code. Raises ``LongctxError`` if nothing answers."""
    server = config.server
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(server.host, server.host)
    verify = client_context(server)
    url = f"{'http' if verify is True else 'https'}://{host}:{server.port}/status"
    key = pick_key(server)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx.get(url, timeout=TIMEOUT_S, headers=headers, trust_env=False, verify=verify)
        response.raise_for_status()
        state = response.json()
    except httpx.HTTPStatusError as error:
        raise LongctxError(f"{url} answers {error.response.status_code}: {error.response.text[:200]}") from None
    except (httpx.HTTPError, ValueError) as error:
        raise LongctxError(
            f"nothing of longctx answers at {url} ({error}); is `longctx serve` running there?"
        ) from None
    sys.stdout.write(json.dumps(state, indent=1) + "\n" if config.json else describe(state))
    return 0


def describe(state: dict[str, Any]) -> str:
    """The state as text: a summary and one row per worker."""
    model = state["model"]
    ready = "ready" if state["ready"] else f"not ready: {state['reason']}"
    lines = [
        f"model {model['id']}, context {model['max_model_len']} tokens, {ready}",
        f"requests in progress {state['requests_in_progress']} of at most {state['max_requests']}",
        *_describe_queue(state["queue"]),
        *(_describe_pool(pool) for pool in state["pools"]),
        *_describe_silence(state["autoscaler_silence_s"]),
        "",
    ]
    rows = [_COLUMNS, *(_describe_worker(worker) for worker in state["workers"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def _describe_queue(queue: dict[str, Any]) -> list[str]:
    if not queue["num_waiting"]:
        return []
    lacking = [f"{queue[f'num_for_{role}']} for {role} workers" for role in ROLES if queue[f"num_for_{role}"]]
    return [f"requests without a worker {queue['num_waiting']}" + (f", {', '.join(lacking)}" if lacking else "")]


def _describe_pool(pool: dict[str, Any]) -> str:
    """One pool: how many workers, how many it is to have, what is on its way, and the last decision."""
    line = f"{pool['role']} pool: {pool['num_live']} workers"
    if pool["max_workers"] is not None:
        target = pool["num_live"] if pool["target_workers"] is None else pool["target_workers"]
        line += f" of {target} ({pool['min_workers']} to {pool['max_workers']})"
    line += "".join(f", {pool[f'num_{what}']} {what}" for what in ("starting", "draining") if pool[f"num_{what}"])
    for start in pool["starts"]:
        words = "waits for a place in the Ray cluster" if start["stage"] == "placing" else "loads the model"
        line += f"; {start['name'] or 'another'} {words}, {start['waited_s']:.0f} s"
    if pool["retry_s"]:
        line += f"; {pool['num_failed']} starts failed, the next is tried in {pool['retry_s']:.0f} s at the earliest"
    if pool["decision"]:
        ago = max(0.0, time.time() - pool["decided_at"])
        line += f"; {pool['decision']} {ago:.0f} s ago: {pool['reason']}"
    return line


def _describe_silence(silence_s: float | None) -> list[str]:
    is_silent = silence_s is not None and silence_s > SILENCE_S
    return [f"the autoscaler has said nothing for {silence_s:.0f} s; pools stay as they are"] if is_silent else []


def _describe_state(worker: dict[str, Any]) -> str:
    if worker["alive"]:
        return "draining" if worker["draining"] else "alive"
    return "starting" if worker["starting"] else "lost"


def _describe_worker(worker: dict[str, Any]) -> tuple[str, ...]:
    engine = worker["engine"]
    return (
        worker["name"],
        worker["role"],
        worker["pool"] or worker["role"],
        _describe_state(worker),
        worker["host"],
        str(worker["pid"]),
        str(worker["sp_degree"]),
        engine["device"],
        engine["dtype"],
        engine["attention"],
        worker["transport"] or "-",
        str(engine["num_running"]),
        str(engine["num_waiting"]),
        str(engine["num_pages_used"]),
        str(engine["num_pages_cached"]),
        str(engine["num_pages"]),
        _describe_bytes(worker["bytes_shipped"]),
        str(engine["num_preemptions"]),
    )


def _describe_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
