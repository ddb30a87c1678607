"""What a plan asks of the simulation: one rate, the highest rate that meets the objectives, and other splits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from cluster.fleet.simulation import FleetPlan, FleetRun, simulate
from cluster.fleet.slo import Latencies, measure
from cluster.fleet.trace import TracedRequest
from longctx.machine_profile import MachineProfile

MakeTrace = Callable[[float], Sequence[TracedRequest]]

PATIENCE_S = 120.0  # after the last arrival: who has not ended then has missed every objective
MAX_DOUBLINGS = 16
PRECISION = 0.02  # of the highest rate
NUM_SPLITS = 12  # that are tried at most


@dataclass(frozen=True, slots=True)
class Point:
    """A fleet at one rate."""

    plan: FleetPlan
    rate: float
    run: FleetRun
    latencies: Latencies


def try_rate(plan: FleetPlan, rate: float, make_trace: MakeTrace, reference: MachineProfile) -> Point:
    """The fleet at one rate, in requests a second."""
    run = simulate(plan, make_trace(rate), patience_s=PATIENCE_S)
    return Point(plan, rate, run, measure(run.jobs, reference))


def find_highest_rate(
    plan: FleetPlan, start: float, make_trace: MakeTrace, reference: MachineProfile
) -> tuple[float, list[Point]]:
    """The highest rate that meets all objectives, within 2 %, or 0 if none was found, and every point on the way."""
    points: list[Point] = []

    def is_good(rate: float) -> bool:
        points.append(try_rate(plan, rate, make_trace, reference))
        return points[-1].latencies.meets_all

    low, high = start, start
    if is_good(start):
        for _ in range(MAX_DOUBLINGS):
            low, high = high, 2 * high
            if not is_good(high):
                break
    else:
        for _ in range(MAX_DOUBLINGS):
            low, high = low / 2, low
            if is_good(low):
                break
        else:
            return 0.0, points
    while high / low > 1 + PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if is_good(middle) else (low, middle)
    return low, sorted(points, key=lambda point: point.rate)


def other_splits(plan: FleetPlan) -> Iterator[FleetPlan]:
    """The same machines with another share of them started for prompts; they must be of one kind."""
    [profile] = {profile for _, profile in plan.machines}
    total = len(plan.machines)
    step = max(1, total // NUM_SPLITS)
    for num_prefill in range(0, total, step):
        groups = ((profile, num_prefill),) if num_prefill else ()
        yield replace(plan, prefill=groups, decode=((profile, total - num_prefill),))
