"""Which pools take more load: workers apart, workers for everything, or Splitwise's mixed pool. Prints JSON.

    python -m benchmarks.pools --save pools

Three deployments of ``longctx serve`` with two workers of one thread each get the same requests at the same times: the
shape of Azure's traces, lengths and rates scaled to this machine. A deployment keeps up with a rate if all of
Splitwise's nine objectives hold (``cluster/fleet/slo.py``): slowdowns against a request that is alone, as this machine
was measured to serve it (``longctx bench``, and what endpoint and router add).
"""

import argparse
import asyncio
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.fleet_check import MAX_CONTEXT, THREADS, measure_overhead, measure_profile, replay, scale_trace
from benchmarks.machine import describe_run, keep_result
from benchmarks.peers import Launch, start_longctx
from benchmarks.timings import RequestTiming
from cluster.fleet.machine import Job
from cluster.fleet.slo import Latencies, measure
from cluster.fleet.trace import SHAPES as TRACES
from cluster.fleet.trace import TracedRequest
from longctx.machine_profile import MachineProfile

logger = logging.getLogger(__name__)

DEPLOYMENTS = {
    "colocated": ["cluster=colocated", "cluster.num_decode_workers=2"],
    "static": ["cluster=disaggregated"],
    "mixed": ["cluster=disaggregated", "cluster.policy=splitwise"],
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="22m")
    parser.add_argument("--traces", nargs="+", choices=sorted(TRACES), default=sorted(TRACES))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0])
    parser.add_argument("--duration", type=float, default=45.0, help="seconds of arrivals")
    parser.add_argument("--scale", type=float, default=0.25, help="of the trace's lengths")
    parser.add_argument("--work", type=Path, default=Path("/tmp/longctx-bench"))
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    checkpoint = ensure_checkpoint(options.model, options.work)
    profile = measure_profile(checkpoint)
    result = describe_run("pools") | {
        "settings": {name: str(value) for name, value in vars(options).items()},
        "profile": {"prompt_times": profile.prompt_times, "token_times": profile.token_times},
        "runs": [],
    }
    overhead_s: float | None = None  # of the first deployment: the measure is the same for all
    for name, overrides in DEPLOYMENTS.items():
        with tempfile.TemporaryDirectory() as folder:
            extra = {"longctx": " ".join([*overrides, *THREADS])}
            engine = start_longctx(Launch(checkpoint, Path(folder), MAX_CONTEXT, 1, "cpu", extra), "longctx")
            try:
                engine.wait_ready(time.monotonic() + 180.0)
                url = engine.url  # type: ignore[attr-defined]
                if overhead_s is None:
                    overhead_s = measure_overhead(url, SHAPES[options.model].vocab_size, profile)
                    result["overhead_s"] = round(overhead_s, 5)
                own = replace(profile, overhead_s=overhead_s)
                for trace_name in options.traces:
                    for rate in options.rates:
                        result["runs"].append(run(url, name, trace_name, rate, own, options))
                        logger.info("%s", result["runs"][-1])
                        keep_result(result, options.save)
            finally:
                engine.tree.stop()
    result["highest_rate"] = {
        trace_name: {name: find_highest(result["runs"], name, trace_name) for name in DEPLOYMENTS}
        for trace_name in options.traces
    }
    keep_result(result, options.save)
    print(json.dumps(result, indent=1))


def run(
    url: str, name: str, trace_name: str, rate: float, profile: MachineProfile, options: argparse.Namespace
) -> dict[str, Any]:
    """One deployment, trace and rate."""
    trace = scale_trace(rate, options, shape=trace_name)
    timings = asyncio.run(replay(url, trace, SHAPES[options.model].vocab_size, seed=int(100 * rate)))
    latencies = measure_slowdowns(trace, timings, profile)
    return {
        "deployment": name,
        "trace": trace_name,
        "rate": rate,
        "num_requests": len(trace),
        "meets_all": latencies.meets_all,
        "missed": latencies.missed,
        "slowdowns": {each: [round(value, 3) for value in values] for each, values in latencies.slowdowns.items()},
        "seconds": {each: [round(value, 4) for value in values] for each, values in latencies.seconds.items()},
    }


def measure_slowdowns(
    trace: Sequence[TracedRequest], timings: Sequence[RequestTiming], profile: MachineProfile
) -> Latencies:
    """As the fleet simulator measures its own jobs; a request counts from when it was sent."""
    jobs = [
        Job(request, request.arrival_s + timing.ttft_s, request.arrival_s + timing.event_s[-1] - timing.sent_s)
        for request, timing in zip(trace, timings, strict=True)
    ]
    return measure(jobs, profile)


def find_highest(runs: Sequence[dict[str, Any]], name: str, trace_name: str) -> float | None:
    """The highest rate up to which every rate was kept up with; None if the lowest was not."""
    highest = None
    for each in sorted((run for run in runs if (run["deployment"], run["trace"]) == (name, trace_name)), key=_rate):
        if not each["meets_all"]:
            break
        highest = each["rate"]
    return highest


def _rate(run: dict[str, Any]) -> float:
    return run["rate"]


if __name__ == "__main__":
    main()
