"""An endpoint under more load than it can take: how fast it refuses, and what those get whom it takes. Prints JSON.

    python -m benchmarks.overload [--factors 3 10] [--seconds 20] [--rounds 5] [--save overload]

``longctx serve cluster=colocated`` with the demo model. Capacity: what a closed loop of ``--places`` clients gets done.
Each round asks alone first, one request after another, and then sends requests at random moments (an open loop: nobody
waits for an answer) so many times as fast as that. ``refusal_ms``: sending to the end of the 429. ``ttft_ms``: sending
to the first event with text. ``tpot_ms``: from there to the end, for each further token. ``late_ms``: how much later
than it should the load generator sent; where it is large, the generator and not the server was the slower one.

With ``--slo-ttft-ms`` and ``--slo-tpot-ms`` the server is told these targets, and ``slo_met`` says which share of the
accepted requests kept both, as their clients saw it.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from benchmarks.machine import REPOSITORY, describe_run, keep_result
from benchmarks.processes import ProcessTree
from benchmarks.report import round_floats

logger = logging.getLogger(__name__)

LIMIT_MS = 50.0  # within which a refusal is to be answered
START_TIMEOUT_S = 240.0
ANSWER_TIMEOUT_S = 120.0
REFUSED_S = 0.05  # that a client of the closed loop waits after a refusal
NUM_ALONE = 20  # requests of a round that have the endpoint for themselves


@dataclass(frozen=True, slots=True)
class Timing:
    """One request; seconds from its sending."""

    status: int
    late_s: float
    first_s: float  # to the first text
    end_s: float
    retry_after_s: int = 0

    def tpot_s(self, outputs: int) -> float:
        """Of an accepted one with so many tokens."""
        return (self.end_s - self.first_s) / (outputs - 1)


class Load:
    """Requests to one endpoint, each with another prompt.

    Args:
        url: of the endpoint, without ``/v1``.
        options: of the command line.
    """

    def __init__(self, url: str, options: argparse.Namespace) -> None:
        self._url, self._options = url, options
        self._rng = random.Random(options.seed)

    async def measure_capacity(self, session: aiohttp.ClientSession) -> float:
        """Requests a second that a closed loop gets done."""
        ended = time.perf_counter() + self._options.seconds / 2
        num_done = 0

        async def work() -> None:
            nonlocal num_done
            while time.perf_counter() < ended:
                timing = await self.ask(session)
                num_done += timing.status == 200 and time.perf_counter() < ended
                if timing.status == 429:
                    await asyncio.sleep(REFUSED_S)

        await asyncio.gather(*(work() for _ in range(self._options.places)))
        return num_done / (self._options.seconds / 2)

    async def ask_alone(self, session: aiohttp.ClientSession) -> list[Timing]:
        """One after another."""
        return [await self.ask(session) for _ in range(NUM_ALONE)]

    async def overload(self, session: aiohttp.ClientSession, requests_per_s: float) -> list[Timing]:
        """Requests at random moments."""
        sending: list[asyncio.Task[Timing]] = []
        began = due = time.perf_counter()
        while due < began + self._options.seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            sending.append(asyncio.create_task(self.ask(session, due)))
            due += self._rng.expovariate(requests_per_s)
        return await asyncio.gather(*sending)

    async def ask(self, session: aiohttp.ClientSession, due: float | None = None) -> Timing:
        """One streamed completion."""
        prompt = [self._rng.randrange(32, 127) for _ in range(self._options.prompt_tokens)]
        body = {"model": "demo", "prompt": prompt, "max_tokens": self._options.outputs, "stream": True}
        data = json.dumps(body | {"ignore_eos": True, "temperature": 0.0})
        sent = time.perf_counter()
        late_s = sent - due if due is not None else 0.0
        first_s = 0.0
        headers = {"content-type": "application/json"}
        try:
            async with session.post(f"{self._url}/v1/completions", data=data, headers=headers) as response:
                async for line in response.content:
                    if not first_s and line.startswith(b"data: {"):
                        first_s = time.perf_counter() - sent
                retry_after_s = int(response.headers.get("retry-after", "0"))
                return Timing(response.status, late_s, first_s, time.perf_counter() - sent, retry_after_s)
        except (aiohttp.ClientError, TimeoutError) as error:
            logger.warning("a request failed: %s", error or type(error).__name__)
            return Timing(0, late_s, 0.0, time.perf_counter() - sent)


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    result = describe_run("overload") | {"settings": vars(options), "limit_ms": LIMIT_MS}
    with tempfile.TemporaryDirectory() as folder, start_server(options, Path(folder)) as url:
        result |= asyncio.run(measure(Load(url, options), options))
    result = round_floats(result | {"load_1m_at_end": os.getloadavg()[0]})
    keep_result(result, options.save)
    print(json.dumps(result, indent=1))


async def measure(load: Load, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await load.ask_alone(session)  # warms up
        capacity = options.capacity or await load.measure_capacity(session)
        logger.info("capacity: %.1f requests/s", capacity)
        alone: list[Timing] = []
        loaded: dict[float, list[list[Timing]]] = {factor: [] for factor in options.factors}
        for round_idx in range(options.rounds):
            alone += await load.ask_alone(session)
            for factor, rounds in loaded.items():
                rounds.append(await load.overload(session, factor * capacity))
                logger.info("round %d, %gx: %s", round_idx + 1, factor, describe(rounds[-1], options))
    return {
        "capacity_requests_per_s": capacity,
        "baseline": {
            "ttft_ms": quantiles([1e3 * timing.first_s for timing in alone]),
            "tpot_ms": quantiles([1e3 * timing.tpot_s(options.outputs) for timing in alone]),
        },
        "overload": [
            {"factor": factor, "requests_per_s": factor * capacity}
            | describe([timing for timings in rounds for timing in timings], options)
            | {"rounds": [describe(timings, options) for timings in rounds]}
            for factor, rounds in loaded.items()
        ],
    }


def describe(timings: Sequence[Timing], options: argparse.Namespace) -> dict[str, Any]:
    """What became of requests that were sent too fast."""
    refused = [timing for timing in timings if timing.status == 429]
    accepted = [timing for timing in timings if timing.status == 200]
    within = sum(1e3 * timing.end_s <= LIMIT_MS for timing in refused)
    return {
        "num_accepted": len(accepted),
        "num_refused": len(refused),
        "num_failed": len(timings) - len(accepted) - len(refused),
        "refusal_ms": quantiles([1e3 * timing.end_s for timing in refused]),
        "share_within_limit": within / max(1, len(refused)),
        "retry_after_s": quantiles([timing.retry_after_s for timing in refused]),
        "ttft_ms": quantiles([1e3 * timing.first_s for timing in accepted]),
        "tpot_ms": quantiles([1e3 * timing.tpot_s(options.outputs) for timing in accepted]),
        "slo_met": sum(keeps_targets(timing, options) for timing in accepted) / max(1, len(accepted)),
        "late_ms": quantiles([1e3 * timing.late_s for timing in timings]),
    }


def keeps_targets(timing: Timing, options: argparse.Namespace) -> bool:
    """Whether an accepted request got what the server was told; true without targets."""
    ttft_ms, tpot_ms = options.slo_ttft_ms or float("inf"), options.slo_tpot_ms or float("inf")
    return 1e3 * timing.first_s <= ttft_ms and 1e3 * timing.tpot_s(options.outputs) <= tpot_ms


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median, 99th percentile and most."""
    if len(values) < 2:
        return None
    return {"p50": statistics.median(values), "p99": statistics.quantiles(values, n=100)[98], "most": max(values)}


@contextmanager
def start_server(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The URL of a ``longctx serve`` that is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "longctx.cli.main", "serve", "cluster=colocated", f"server.port={port}"]
    for name in ("ttft", "tpot"):
        if (target_ms := getattr(options, f"slo_{name}_ms")) is not None:
            words.append(f"server.slo_{name}_s={target_ms / 1e3}")
    words += [f"server.max_requests={options.places}", "engine.kv_bytes=256MiB", "engine.num_threads=1"]
    # Ray's workers are nice (15): the load generator, and whatever else runs here, would keep the cores from them.
    tree = ProcessTree(words, folder / "serve.log", env={"RAY_worker_niceness": "0"}, cwd=REPOSITORY)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _is_ready(url):
            tree.check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the endpoint is not ready: {tree.log_tail()}")
            time.sleep(0.2)
        yield url
    finally:
        tree.stop()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url + "/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", nargs="+", type=float, default=[3.0, 10.0], help="times the capacity")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--places", type=int, default=16, help="server.max_requests")
    parser.add_argument(
        "--capacity", type=float, help="requests/s, measured before: with targets a closed loop is refused for a while"
    )
    parser.add_argument("--slo-ttft-ms", type=float, help="the server is told this target")
    parser.add_argument("--slo-tpot-ms", type=float)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--outputs", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="NAME", help="also write benchmarks/results/NAME.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
