"""What each pool has to do, out of what the endpoint sees: arithmetic, without Ray.

Prompts that wait count for the prefill pool, whoever holds them; so do those that decode workers compute for it under a
policy that repurposes. A request without room counts for the decode pool. Workers that drain share nothing.
"""

from collections.abc import Collection, Iterator, Sequence

from cluster.autoscale.config import AutoscaleConfig, DecodeScaling
from cluster.autoscale.decision import Demand, Latency, PoolLoad
from cluster.config import ServeConfig
from cluster.messages import Observation
from cluster.peer import PREFILL_WINDOW
from cluster.serving import WorkerStats


def measure_pool(
    observation: Observation,
    config: ServeConfig,
    role: str,
    *,
    starting: Collection[str] = (),
    num_unnamed: int = 0,
    draining: Collection[str] = (),
    num_started: int = 0,
    num_failed: int = 0,
) -> PoolLoad:
    """The load of one pool.

    Args:
        observation: the endpoint's.
        config: the deployment's.
        role: of the pool.
        starting: workers that are not to be counted on yet, whatever the endpoint says of them.
        num_unnamed: more of them.
        draining: workers that drain, whatever the endpoint says.
        num_started, num_failed: starts in all.
    """
    workers = [worker for worker in observation.workers if worker.role == role]
    leaving = [worker for worker in workers if is_leaving(worker, starting, draining)]
    live = [worker for worker in workers if worker.alive and worker.name not in starting and worker not in leaving]
    known = {worker.name for worker in workers}
    num_coming = len(workers) - len(live) - len(leaving) + sum(name not in known for name in starting)
    is_prefill = role == "prefill"
    queue = observation.queue
    num_jobs = sum(worker.engine.num_running + worker.engine.num_waiting for worker in live)
    return PoolLoad(
        num_live=len(live),
        num_starting=num_coming + num_unnamed,
        num_draining=len(leaving),
        num_jobs=num_jobs + (queue.num_for_prefill if is_prefill else queue.num_for_decode),
        demands=tuple((_list_prefill if is_prefill else _list_decode)(observation, config, live)),
        latencies=tuple(_list_latencies(observation, config.cluster.autoscale, role, _has_prefill(config))),
        num_started=num_started,
        num_failed=num_failed,
    )


def is_leaving(worker: WorkerStats, starting: Collection[str], draining: Collection[str]) -> bool:
    """Whether a worker drains, as far as is known."""
    return worker.name in draining or (worker.draining and worker.name not in starting)


def _list_prefill(observation: Observation, config: ServeConfig, live: Sequence[WorkerStats]) -> Iterator[Demand]:
    mixed = [worker for worker in observation.workers if worker.role == "decode" and worker.pool == "mixed"]
    total = sum(worker.engine.pending_prefill_tokens for worker in [*live, *mixed]) + observation.queue.prefill_tokens
    yield _pending_tokens(config, "prefill", total)


def _list_decode(observation: Observation, config: ServeConfig, live: Sequence[WorkerStats]) -> Iterator[Demand]:
    pool = config.cluster.autoscale.decode
    assert isinstance(pool, DecodeScaling)
    engines = [worker.engine for worker in live if worker.engine.num_pages]
    if engines:
        num_pages = sum(engine.num_pages for engine in engines) / len(engines)
        yield Demand("KV pages", sum(engine.num_pages_used for engine in engines), num_pages * pool.max_page_share)
    num_waiting = sum(worker.engine.num_waiting for worker in live) + observation.queue.num_for_decode
    yield Demand("requests without room", num_waiting, pool.max_waiting)
    if not _has_prefill(config):
        total = sum(engine.pending_prefill_tokens for engine in engines)
        yield _pending_tokens(config, "decode", total)


def _pending_tokens(config: ServeConfig, role: str, total: int) -> Demand:
    own = config.cluster.group_of(role)
    most = PREFILL_WINDOW * config.engine_of(role).max_batch_tokens * own.sp_degree
    return Demand("pending prompt tokens", total, config.cluster.autoscale.pool_of(role).max_pending_tokens or most)


def _list_latencies(
    observation: Observation, config: AutoscaleConfig, role: str, has_prefill: bool
) -> Iterator[Latency]:
    """What the workers of one role answer for."""
    ttft = f"TTFT p{config.percentile:g}"
    short, long = observation.ttft_s, observation.long_ttft_s
    if role == "prefill":
        if long is not None and config.ttft_target_s is not None and not observation.queue.num_for_decode:
            yield Latency(ttft, long, config.ttft_target_s)
        return
    if config.tpot_target_s is not None and observation.tpot_s is not None:
        yield Latency(f"TPOT p{config.percentile:g}", observation.tpot_s, config.tpot_target_s)
    own = [seconds for seconds in (short, None if has_prefill else long) if seconds is not None]
    if config.ttft_target_s is not None and own:
        yield Latency(ttft, max(own), config.ttft_target_s)


def _has_prefill(config: ServeConfig) -> bool:
    return config.cluster.num_prefill_workers > 0
