"""The fleet simulator against Splitwise's published figures, and how long 1,000 machines take; prints JSON.

    python -m benchmarks.fleet --save fleet

Throughputs are the highest rates that meet all nine objectives, of clusters that cost or draw the same, with Azure's
conversation lengths and independent arrivals. The paper's (Patel et al., 2023, sections VI-C and VII): 1.4x the
throughput at 20 % lower cost, and 2.35x at equal power and cost.
"""

import argparse
import json
import time
from typing import Any

from benchmarks.machine import describe_run, keep_result
from cluster.fleet.search import find_highest_rate
from cluster.fleet.simulation import FleetPlan, simulate
from cluster.fleet.slo import measure
from cluster.fleet.trace import SHAPES, draw_trace
from cluster.plan_cluster import PROFILES
from longctx.machine_profile import load_profile

H100, A100 = (load_profile(f"llama2-70b-dgx-{name}", PROFILES) for name in ("h100", "a100"))
# As many machines as the paper's clusters of equal cost have: name, (prompt machines), (token machines), policy
CLUSTERS: dict[str, tuple[dict[str, int], dict[str, int], str]] = {
    "baseline A100": ({}, {"a100": 86}, "shortest_queue"),
    "baseline H100": ({}, {"h100": 40}, "shortest_queue"),
    "splitwise AA": ({"a100": 51}, {"a100": 35}, "splitwise"),
    "splitwise HH": ({"h100": 25}, {"h100": 15}, "splitwise"),
    "splitwise HA": ({"h100": 30}, {"a100": 21}, "splitwise"),
    "splitwise HH, static": ({"h100": 25}, {"h100": 15}, "shortest_queue"),
} | {
    # other splits of the same machines: ours differ in what a step of prompts and tokens together costs
    f"splitwise {kind[0].upper()}{kind[0].upper()}, {num} prompt machines": (
        {kind: num},
        {kind: total - num},
        "splitwise",
    )
    for kind, total, nums in (("a100", 86, (20, 25, 30)), ("h100", 40, (6, 8, 10)))
    for num in nums
}
MACHINES = {"h100": H100, "a100": A100}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of arrivals")
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    options = parser.parse_args()
    result = describe_run("fleet") | {"clusters": measure_clusters(options.duration), "large": measure_large()}
    print(json.dumps(result, indent=1))
    keep_result(result, options.save)


def make_plan(name: str) -> FleetPlan:
    """One of the clusters."""
    prefill, decode, policy = CLUSTERS[name]
    groups = [tuple((MACHINES[kind], count) for kind, count in part.items()) for part in (prefill, decode)]
    return FleetPlan(groups[0], groups[1], policy)


def measure_clusters(duration_s: float) -> dict[str, Any]:
    """Highest rates, per cost and power, and over the baseline on A100."""

    def make(rate: float) -> Any:
        shape = SHAPES["azure_conversation"]
        return draw_trace(shape, rate=rate, duration_s=duration_s, seed=0, steady=True)

    found = {}
    for name in CLUSTERS:
        plan = make_plan(name)
        rate, points = find_highest_rate(plan, 60.0, make, A100)
        machines = [profile for _, profile in plan.machines]
        found[name] = {
            "rate": round(rate, 2),
            "missed_above": next((point.latencies.missed for point in points if point.rate > rate), []),
            "cost_per_hour": sum(each.cost_per_hour for each in machines),
            "kilowatts": sum(each.watts for each in machines) / 1000,
        }
        print(name, found[name], flush=True)
    for each in found.values():
        each["over_baseline_a100"] = round(each["rate"] / max(1e-9, found["baseline A100"]["rate"]), 3)
        each["over_baseline_h100"] = round(each["rate"] / max(1e-9, found["baseline H100"]["rate"]), 3)
    return found


def measure_large() -> dict[str, Any]:
    """1,000 machines at their pace for a while."""
    plan = FleetPlan(((H100, 600),), ((H100, 400),), "splitwise")
    trace = draw_trace(SHAPES["azure_conversation"], rate=1500.0, duration_s=10.0, seed=0, steady=True)
    begun = time.perf_counter()
    run = simulate(plan, trace)
    taken = time.perf_counter() - begun
    latencies = measure(run.jobs, H100)
    return {"machines": 1000, "requests": len(trace), "seconds": round(taken, 2), "missed": latencies.missed}


if __name__ == "__main__":
    main()
