"""``longctx status``: asks the endpoint what runs where, and prints it."""

import json
import sys
from typing import Any

import httpx

from cluster.config import StatusConfig
from cluster.key_ring import pick_key
from cluster.tls import client_context
from longctx.errors import LongctxError

TIMEOUT_S = 10.0
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
        "",
    ]
    rows = [_COLUMNS, *(_describe_worker(worker) for worker in state["workers"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def _describe_worker(worker: dict[str, Any]) -> tuple[str, ...]:
    engine = worker["engine"]
    return (
        worker["name"],
        worker["role"],
        worker["pool"] or worker["role"],
        ("draining" if worker["draining"] else "alive") if worker["alive"] else "lost",
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
