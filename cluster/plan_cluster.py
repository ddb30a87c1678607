"""``longctx plan cluster``: how a fleet would serve a trace, as a table and a picture."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.fleet.config import PlanClusterConfig
from cluster.fleet.search import Point, find_highest_rate, other_splits, try_rate
from cluster.fleet.simulation import FleetPlan
from cluster.fleet.slo import LIMITS, PERCENTILES
from cluster.fleet.trace import SHAPES, TracedRequest, draw_trace, load_trace
from longctx.cli.plan_text import align
from longctx.errors import ConfigError
from longctx.machine_profile import MachineProfile, load_profile

logger = logging.getLogger(__name__)

PROFILES = Path(__file__).parent / "fleet" / "profiles"
_COLUMNS = (
    "prefill", "decode", "rate/s", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99", "E2E p50", "p99",
    "busy P", "busy D", "mixed", "kW", "$/h", "objectives",
)  # fmt: skip


def plan_cluster(config: PlanClusterConfig) -> int:
    """Print what would happen; 0 if some fleet meets all objectives, else 1. Raises ``ConfigError``."""
    fleet = config.fleet
    if not fleet.decode:
        raise ConfigError("fleet.decode is empty: somebody has to generate")
    for key, value, suffix in (("picture", config.picture, ".png"), ("json_file", config.json_file, ".json")):
        if value is not None and Path(value).suffix != suffix:
            raise ConfigError(f"{key}={value} is not allowed: a file NAME{suffix}")
    groups = [tuple(_read_machines(key, getattr(fleet, key))) for key in ("prefill", "decode")]
    plan = FleetPlan(*groups, policy=fleet.policy, local_prefill_tokens=fleet.local_prefill_tokens)
    reference = plan.decode[0][0] if fleet.reference is None else load_profile(fleet.reference, PROFILES)
    if config.splits and len({profile for _, profile in plan.machines}) > 1:
        raise ConfigError("splits=true is not allowed with machines of several kinds: which of them to move is yours")
    trace = _Trace(config)
    rate = trace.rate
    plans = list(other_splits(plan)) if config.splits else [plan]
    best, points = [], []
    for each in plans:
        if config.find_rate:
            highest, found = find_highest_rate(each, rate, trace.make, reference)
            points += found
            best.append(_pick(found, highest))
        else:
            best.append(try_rate(each, rate, trace.make, reference))
            points.append(best[-1])
    sys.stdout.write("\n".join(_describe(config, best, reference)) + "\n")
    _save(config, best, points)
    return 0 if any(point.latencies.meets_all for point in best) else 1


class _Trace:
    def __init__(self, config: PlanClusterConfig) -> None:
        self._config = config.trace
        self._file = None if self._config.file is None else Path(self._config.file)
        if self._file is None and self._config.rate is None:
            raise ConfigError("trace.rate=null is not allowed without trace.file: a shape says nothing of the rate")
        self.rate = self._config.rate or self._rate_of_file()

    def make(self, rate: float) -> Sequence[TracedRequest]:
        config = self._config
        if self._file is not None:
            return load_trace(self._file, rate=rate)
        shape = SHAPES[config.shape]
        requests = draw_trace(shape, rate=rate, duration_s=config.duration_s, seed=config.seed, steady=config.steady)
        if not requests:
            raise ConfigError(f"trace.rate={rate:g} trace.duration_s={config.duration_s:g} is not a single request")
        return requests

    def _rate_of_file(self) -> float:
        assert self._file is not None
        requests = load_trace(self._file)
        if requests[-1].arrival_s == 0:
            raise ConfigError(f"trace.file={self._file} has all requests at one time: give a trace.rate")
        return (len(requests) - 1) / requests[-1].arrival_s


def _read_machines(key: str, entries: Sequence[str]) -> Iterator[tuple[MachineProfile, int]]:
    for entry in entries:
        name, _, count = entry.rpartition(":")
        if not name or not count.isdecimal() or not int(count):
            raise ConfigError(f"fleet.{key}: {entry!r} is not allowed: PROFILE:COUNT, as llama2-70b-dgx-h100:4")
        yield load_profile(name, PROFILES), int(count)


def _pick(points: Sequence[Point], rate: float) -> Point:
    """The point of the highest rate; the lowest that was tried if none was good enough."""
    return next((point for point in points if point.rate == rate), min(points, key=lambda point: point.rate))


def _describe(config: PlanClusterConfig, points: Sequence[Point], reference: MachineProfile) -> Iterator[str]:
    trace = config.trace
    what = trace.file or f"{trace.shape} for {trace.duration_s:g} s"
    yield f"{len(points[0].run.jobs):,} requests ({what}), policy {config.fleet.policy}; 1x is {reference.name} alone"
    limits = ", ".join(f"{name.upper()} {'/'.join(f'{limit:g}' for limit in LIMITS[name])}x" for name in LIMITS)
    yield f"objectives at p{'/p'.join(map(str, PERCENTILES))}: {limits}"
    yield ""
    yield from align([_COLUMNS, *(_describe_point(point) for point in points)])
    if config.find_rate and len(points) > 1:
        top = max(points, key=lambda point: point.rate * point.latencies.meets_all)
        if top.latencies.meets_all:
            counts = [sum(count for _, count in group) for group in (top.plan.prefill, top.plan.decode)]
            yield f"best: {counts[0]} prefill and {counts[1]} decode machines, {top.rate:.4g} requests/s"


def _describe_point(point: Point) -> tuple[str, ...]:
    seconds, run, plan = point.latencies.seconds, point.run, point.plan
    ttft, tpot, e2e = (seconds[name] for name in LIMITS)
    missed = point.latencies.missed
    return (
        _describe_group(plan.prefill),
        _describe_group(plan.decode),
        f"{point.rate:.4g}",
        *(f"{1000 * value:.0f} ms" for value in ttft),
        *(f"{1000 * value:.1f} ms" for value in tpot),
        *(f"{value:.2f} s" for value in (e2e[0], e2e[-1])),
        *(f"{100 * run.busy_share[role]:.0f} %" for role in ("prefill", "decode")),
        f"{100 * run.mixed_share:.0f} %",
        f"{_total(plan, 'watts') / 1000:g}",
        f"{_total(plan, 'cost_per_hour'):g}",
        "all met" if not missed else "missed: " + ", ".join(missed),
    )


def _describe_group(group: Sequence[tuple[MachineProfile, int]]) -> str:
    return " + ".join(f"{count} {profile.name}" for profile, count in group) or "-"


def _total(plan: FleetPlan, name: str) -> float:
    return sum(getattr(profile, name) for _, profile in plan.machines)


def _save(config: PlanClusterConfig, best: Sequence[Point], points: Sequence[Point]) -> None:
    try:
        if config.json_file is not None:
            content = {"best": list(map(_to_json, best)), "points": list(map(_to_json, points))}
            Path(config.json_file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if config.picture is not None:
            from cluster.fleet.picture import draw_points

            draw_points(points, Path(config.picture))
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from None


def _to_json(point: Point) -> dict[str, Any]:
    plan, latencies = point.plan, point.latencies
    return {
        "prefill": {profile.name: count for profile, count in plan.prefill},
        "decode": {profile.name: count for profile, count in plan.decode},
        "policy": plan.policy,
        "rate": point.rate,
        "num_requests": len(point.run.jobs),
        "seconds": latencies.seconds,
        "slowdowns": latencies.slowdowns,
        "missed": latencies.missed,
        "busy_share": point.run.busy_share,
        "mixed_share": point.run.mixed_share,
        "watts": _total(plan, "watts"),
        "cost_per_hour": _total(plan, "cost_per_hour"),
    }
