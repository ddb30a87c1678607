"""The fleet simulator against real runs of this machine: medians of time to first token and per token; prints JSON.

    python -m benchmarks.fleet_check --save fleet-check

A deployment of ``longctx serve`` (one prefill and one decode worker of one thread each) is sent one trace, open loop;
``longctx bench``, with one thread, gives the profile; what router and endpoint add is measured with single requests and
told to the simulation. Lengths have the shape of Azure's conversations, scaled to what this machine can do.
"""

import argparse
import asyncio
import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.checkpoints import FIRST_WORD_ID, SHAPES, ensure_checkpoint
from benchmarks.load import complete, make_body
from benchmarks.machine import REPOSITORY, describe_run, keep_result
from benchmarks.peers import Launch, start_longctx
from benchmarks.timings import RequestTiming
from cluster.fleet.simulation import FleetPlan, simulate
from cluster.fleet.slo import measure
from cluster.fleet.trace import SHAPES as TRACES
from cluster.fleet.trace import TracedRequest, draw_trace
from longctx.machine_profile import MachineProfile, load_profile

logger = logging.getLogger(__name__)

MAX_CONTEXT = 4096
TARGET = 0.10  # of the real medians
THREADS = ["engine.num_threads=1", "engine.prefix_cache=false"]
DEPLOYMENTS = {
    "apart": ["cluster=disaggregated"],
    "splitwise": ["cluster=disaggregated", "cluster.policy=splitwise"],
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="22m")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of arrivals")
    parser.add_argument("--scale", type=float, default=0.25, help="of the trace's lengths")
    parser.add_argument("--deployments", nargs="+", choices=sorted(DEPLOYMENTS), default=sorted(DEPLOYMENTS))
    parser.add_argument("--work", type=Path, default=Path("/tmp/longctx-bench"))
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    result = describe_run("fleet_check") | {
        "settings": {name: str(value) for name, value in vars(options).items()},
        "target": TARGET,
        "runs": run(options),
    }
    print(json.dumps(result, indent=1))
    keep_result(result, options.save)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every deployment at every rate, and what the simulation says of it."""
    checkpoint = ensure_checkpoint(options.model, options.work)
    profile = measure_profile(checkpoint)
    logger.info("profile: prompts %s, tokens %s", profile.prompt_times, profile.token_times)
    runs = []
    for name in options.deployments:
        with tempfile.TemporaryDirectory() as folder:
            extra = {"longctx": " ".join([*DEPLOYMENTS[name], *THREADS])}
            engine = start_longctx(Launch(checkpoint, Path(folder), MAX_CONTEXT, 1, "cpu", extra), "longctx")
            try:
                engine.wait_ready(time.monotonic() + 180.0)
                url, vocab_size = engine.url, SHAPES[options.model].vocab_size  # type: ignore[attr-defined]
                own = replace(profile, overhead_s=measure_overhead(url, vocab_size, profile))
                for rate in options.rates:
                    trace = scale_trace(rate, options)
                    timings = asyncio.run(replay(url, trace, vocab_size))
                    runs.append(compare(name, rate, trace, timings, own))
                    logger.info("%s", runs[-1])
            finally:
                engine.tree.stop()
    return runs


def measure_profile(checkpoint: Path) -> MachineProfile:
    """What one worker of one thread does, while another one is as busy."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.json" for number in range(2)]
        command = [sys.executable, "-m", "longctx.cli.main", "bench", f"model.path={checkpoint}", *THREADS]
        command += ["model.device=cpu", "engine=default", "bench.max_sequences=16", "engine.kv_bytes=1GiB"]
        command += [f"model.max_context={MAX_CONTEXT}", "bench.num_rounds=3"]
        both = [subprocess.Popen([*command, f"bench.file={file}"], cwd=REPOSITORY) for file in files]
        if any(process.wait(600) for process in both):
            raise RuntimeError("longctx bench failed")
        return load_profile(str(files[0]), Path(folder))


def measure_overhead(url: str, vocab_size: int, profile: MachineProfile) -> float:
    """Seconds that a single request's first token takes more than its prompt."""
    trace = [TracedRequest(0.0, 600, 4)]
    timings = [asyncio.run(replay(url, trace, vocab_size, seed=seed))[0] for seed in range(8)]
    alone = profile.prompt_time(600)
    return max(0.0, statistics.median(timing.ttft_s for timing in timings[2:]) - alone)


def scale_trace(rate: float, options: argparse.Namespace, *, shape: str = "azure_conversation") -> list[TracedRequest]:
    """Requests with shorter prompts and outputs; none is longer than the context."""
    trace = draw_trace(TRACES[shape], rate=rate, duration_s=options.duration, seed=int(10 * rate), steady=True)
    return [
        TracedRequest(
            each.arrival_s,
            max(8, int(each.num_prompt_tokens * options.scale)),
            max(2, int(each.num_output_tokens * options.scale)),
        )
        for each in trace
    ]


async def replay(url: str, trace: Sequence[TracedRequest], vocab_size: int, *, seed: int = 0) -> list[RequestTiming]:
    """Send every request at its time; in order."""
    rng = random.Random(seed)
    bodies = [
        make_body(
            "bench",
            [rng.randrange(FIRST_WORD_ID, vocab_size) for _ in range(each.num_prompt_tokens)],
            each.num_output_tokens,
        )
        for each in trace
    ]
    limits = aiohttp.ClientTimeout(total=600.0)
    async with aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=0)) as session:
        begun = asyncio.get_running_loop().time()

        async def send(request: TracedRequest, body: str) -> RequestTiming:
            await asyncio.sleep(begun + request.arrival_s - asyncio.get_running_loop().time())
            return await complete(session, url, body, num_prompt_tokens=request.num_prompt_tokens)

        return await asyncio.gather(*map(send, trace, bodies))


def compare(
    name: str, rate: float, trace: Sequence[TracedRequest], timings: Sequence[RequestTiming], profile: MachineProfile
) -> dict[str, Any]:
    """Medians, real and simulated."""
    plan = FleetPlan(((profile, 1),), ((profile, 1),), "splitwise" if name == "splitwise" else "shortest_queue")
    latencies = measure(simulate(plan, trace).jobs, profile)
    real = {
        "ttft": statistics.median(timing.ttft_s for timing in timings),
        "tpot": statistics.median(timing.tpot_s for timing in timings),
    }
    simulated = {each: latencies.seconds[each][0] for each in real}
    return {
        "deployment": name,
        "rate": rate,
        "num_requests": len(trace),
        "real_s": {each: round(value, 5) for each, value in real.items()},
        "simulated_s": {each: round(value, 5) for each, value in simulated.items()},
        "ratio": {each: round(simulated[each] / real[each], 3) for each in real},
        "overhead_s": round(profile.overhead_s, 5),
    }


if __name__ == "__main__":
    main()
