"""Splitwise's nine service level objectives: slowdowns against a machine that has nothing else to do (section V)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.fleet.machine import Job
from longctx.machine_profile import MachineProfile

PERCENTILES = (50, 90, 99)
LIMITS = {"ttft": (2.0, 3.0, 6.0), "tpot": (1.25, 1.5, 5.0), "e2e": (1.25, 1.5, 5.0)}


@dataclass(frozen=True, slots=True)
class Latencies:
    """Percentiles of one run: seconds, and times as long as alone. A request that did not end counts as endless."""

    seconds: dict[str, tuple[float, ...]]  # ttft, tpot and e2e at PERCENTILES
    slowdowns: dict[str, tuple[float, ...]]

    @property
    def meets_all(self) -> bool:
        """Whether all nine hold."""
        return not self.missed

    @property
    def missed(self) -> list[str]:
        """Those that do not, as ``ttft p99 7.1x``."""
        return [
            f"{name} p{percent} {value:.2f}x"
            for name, limits in LIMITS.items()
            for percent, limit, value in zip(PERCENTILES, limits, self.slowdowns[name], strict=True)
            if value > limit
        ]


def measure(jobs: Sequence[Job], reference: MachineProfile) -> Latencies:
    """Latencies of a run.

    Args:
        jobs: of the run.
        reference: the machine whose own times are 1x.
    """
    seconds: dict[str, list[float]] = {name: [] for name in LIMITS}
    slowdowns: dict[str, list[float]] = {name: [] for name in LIMITS}
    for job in jobs:
        request, ended = job.request, job.end_s > 0
        num_further = request.num_output_tokens - 1
        ttft = job.first_token_s - request.arrival_s if job.first_token_s else math.inf
        e2e = job.end_s - request.arrival_s if ended else math.inf
        alone_ttft = reference.prompt_time(request.num_prompt_tokens) + reference.overhead_s
        alone_tpot = reference.token_time(1, request.num_prompt_tokens)
        values = {"ttft": (ttft, alone_ttft), "e2e": (e2e, alone_ttft + num_further * alone_tpot)}
        if num_further:
            values["tpot"] = ((job.end_s - job.first_token_s) / num_further if ended else math.inf, alone_tpot)
        for name, (value, alone) in values.items():
            seconds[name].append(value)
            slowdowns[name].append(value / alone)
    return Latencies(*({name: _percentiles(values) for name, values in each.items()} for each in (seconds, slowdowns)))


def _percentiles(values: list[float]) -> tuple[float, ...]:
    ordered = sorted(values) or [0.0]
    return tuple(ordered[min(len(ordered) - 1, math.ceil(percent / 100 * len(ordered)) - 1)] for percent in PERCENTILES)
