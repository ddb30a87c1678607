"""When a pool of workers grows or shrinks: a pure function of what was seen. No Ray, no clock of its own.

What a pool has to do is a list of totals that its workers share (prompt tokens, KV pages, requests that wait), each
with a mark of what one worker may have: the largest ratio says how many workers it takes. A missed target of TTFT or
TPOT says only that they are too few, and counts while there were more jobs at one time than workers: with fewer, one
more worker serves nobody sooner. A pool shrinks if what there is stays far below the others' marks: so a constant load
finds one size and stays there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster.autoscale.config import AutoscaleConfig

MAX_DOUBLINGS = 5  # of the time between failed starts
MAX_GAP_S = 10.0  # and three intervals: after longer without a look, what lasted is not known


@dataclass(frozen=True, slots=True)
class Demand:
    """Something that the workers of a pool share."""

    name: str  # as reasons call it
    total: float
    per_worker: float  # that one may have

    @property
    def num_workers(self) -> float:
        """That it takes."""
        return self.total / self.per_worker

    def describe(self, num_workers: int) -> str:
        """It, and what so many workers may have of it."""
        return f"{_round(self.total)} {self.name} for {num_workers} workers of {_round(self.per_worker)} each"


@dataclass(frozen=True, slots=True)
class Latency:
    """What requests experienced, against what is good enough."""

    name: str
    seconds: float
    target_s: float


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """One pool at one moment."""

    num_live: int  # workers that take requests
    num_starting: int = 0  # on their way: no room yet, loading, or coming back
    num_draining: int = 0
    num_jobs: int = 0  # prompts or sequences that are there or wait for the pool
    demands: tuple[Demand, ...] = ()
    latencies: tuple[Latency, ...] = ()  # with a target
    num_started: int = 0  # workers that were started in all
    num_failed: int = 0  # that could not be started in all

    @property
    def num_workers(self) -> int:
        """That there are or will be."""
        return self.num_live + self.num_starting


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """What is remembered of one pool from one look to the next."""

    looked_at: float = -math.inf
    short_since: float | None = None
    idle_since: float | None = None
    ready_at: float = -math.inf  # the last change has had its effect
    retry_at: float = -math.inf  # after a failed start
    num_started: int = 0
    num_failed: int = 0
    num_failed_in_row: int = 0
    jobs: tuple[tuple[float, int], ...] = ()  # when, and how many, in the window

    @property
    def most_jobs(self) -> int:
        """At one time, in the window."""
        return max((num_jobs for _, num_jobs in self.jobs), default=0)


@dataclass(frozen=True, slots=True)
class Change:
    """A pool gets ``num_workers`` more, or gives one up if that is -1."""

    role: str
    num_workers: int
    reason: str


def decide(
    loads: Mapping[str, PoolLoad], config: AutoscaleConfig, memory: Mapping[str, PoolMemory], *, now: float
) -> tuple[list[Change], dict[str, PoolMemory]]:
    """What to change now, and what to remember until the next look.

    Args:
        loads: of each pool, by role.
        config: bounds, marks and times.
        memory: what the last call returned; empty at first.
        now: in seconds that only grow.
    """
    changes, remembered = [], {}
    for role, load in loads.items():
        known = _remember(memory.get(role, PoolMemory()), load, config, now)
        change, remembered[role] = _decide_pool(role, load, config, known, now)
        if change is not None:
            changes.append(change)
    return changes, remembered


def _decide_pool(
    role: str, load: PoolLoad, config: AutoscaleConfig, memory: PoolMemory, now: float
) -> tuple[Change | None, PoolMemory]:
    pool, num_workers = config.pool_of(role), load.num_workers
    if num_workers < pool.min_workers:
        few = f"{num_workers} workers are fewer than min_workers={pool.min_workers}"
        missing = Change(role, pool.min_workers - num_workers, few)
        return missing if now >= memory.retry_at else None, replace(memory, short_since=None, idle_since=None)
    shortage = _find_shortage(load, memory)
    excess = "" if shortage else _find_excess(load, memory, config, pool.min_workers)
    memory = replace(
        memory,
        short_since=(now if memory.short_since is None else memory.short_since) if shortage else None,
        idle_since=(now if memory.idle_since is None else memory.idle_since) if excess else None,
    )
    if now < memory.ready_at:
        return None, memory
    num_more = 0
    if _lasts(memory.short_since, config.grow_after_s, now) and now >= memory.retry_at:
        num_more = max(1, min(config.max_step, _count_needed(load) - num_workers))
        num_more = min(num_more, pool.max_workers - num_workers)
    if num_more > 0:
        change = Change(role, num_more, f"{shortage}, for {config.grow_after_s:g} s")
    elif _lasts(memory.idle_since, config.shrink_after_s, now):
        change = Change(role, -1, f"{excess}, for {config.shrink_after_s:g} s")
    else:
        return None, memory
    return change, replace(memory, ready_at=now + config.cooldown_s, short_since=None, idle_since=None)


def _remember(memory: PoolMemory, load: PoolLoad, config: AutoscaleConfig, now: float) -> PoolMemory:
    """With what is new: starts that succeeded or failed, and jobs."""
    if now - memory.looked_at > MAX_GAP_S + 3 * config.interval_s:
        memory = replace(memory, short_since=None, idle_since=None, jobs=())
    jobs = tuple(entry for entry in memory.jobs if entry[0] >= now - config.window_s)
    memory = replace(memory, looked_at=now, jobs=(*jobs, (now, load.num_jobs)))
    if load.num_started > memory.num_started:
        memory = replace(memory, num_started=load.num_started, num_failed_in_row=0, retry_at=-math.inf)
    if load.num_failed > memory.num_failed:
        num_in_row = memory.num_failed_in_row + 1
        wait_s = config.retry_s * 2 ** min(num_in_row - 1, MAX_DOUBLINGS)
        memory = replace(memory, num_failed=load.num_failed, num_failed_in_row=num_in_row, retry_at=now + wait_s)
    return memory


def _find_shortage(load: PoolLoad, memory: PoolMemory) -> str:
    """Why there are too few workers, counting those that are on their way; empty if there are enough."""
    most = max(load.demands, key=lambda demand: demand.num_workers, default=None)
    if most is not None and most.num_workers > load.num_workers:
        return most.describe(load.num_workers)
    if load.num_starting or memory.most_jobs <= load.num_live:
        return ""
    missed = (each for each in load.latencies if each.seconds > each.target_s)
    return next((f"{each.name} of {each.seconds:.3g} s is above {each.target_s:g} s" for each in missed), "")


def _find_excess(load: PoolLoad, memory: PoolMemory, config: AutoscaleConfig, min_workers: int) -> str:
    """Why one worker less would do; empty if it would not, or something is under way."""
    num_others = load.num_live - 1
    if load.num_starting or load.num_draining or num_others < min_workers:
        return ""
    most = max((demand.num_workers for demand in load.demands), default=0.0)
    if most > config.shrink_below * num_others:
        return ""
    scale = load.num_live / num_others if memory.most_jobs > num_others else 0.0  # jobs that do not share do not wait
    if any(each.seconds * scale > each.target_s for each in load.latencies):
        return ""
    return f"{num_others} workers would be {most / num_others:.0%} busy"


def _round(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count_needed(load: PoolLoad) -> int:
    return math.ceil(max((demand.num_workers for demand in load.demands), default=0.0) - 1e-9)


def _lasts(since: float | None, duration_s: float, now: float) -> bool:
    return since is not None and now - since >= duration_s
