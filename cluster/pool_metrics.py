"""Prometheus metrics of pools, of the router's queue and of what requests experienced in the last minute."""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.autoscale.latency_window import LatencyWindow
from cluster.serving import PoolStatus, QueueStats

WINDOW_S = 60.0
PERCENTILES = (50.0, 90.0, 99.0)
STAGES = ("placing", "loading")

# Name, what it says, how it is read; None: not while nobody scales. Names follow the fields of PoolStatus.
GAUGES: tuple[tuple[str, str, Callable[[PoolStatus], float | None]], ...] = (
    ("min_workers", "Workers that the pool has at least", lambda pool: pool.min_workers),
    ("max_workers", "Workers that the pool has at most", lambda pool: pool.max_workers),
    ("target_workers", "Workers that the pool is to have", lambda pool: pool.target_workers),
)
COUNTERS: tuple[tuple[str, str, Callable[[PoolStatus], float]], ...] = (
    ("grown", "Decisions to grow", lambda pool: pool.num_grown),
    ("shrunk", "Decisions to shrink", lambda pool: pool.num_shrunk),
    ("failed_starts", "Workers that could not be started", lambda pool: pool.num_failed),
)


class PoolMetrics(Collector):
    """Read by the registry; ``pools`` and ``queue`` are set just before each scrape.

    Args:
        window: what requests experienced.
    """

    def __init__(self, window: LatencyWindow) -> None:
        self._window = window
        self.pools: Sequence[PoolStatus] = ()
        self.queue = QueueStats()

    def collect(self) -> Iterable[Metric]:
        workers = GaugeMetricFamily("longctx_pool_workers", "Workers by what they do", labels=("role", "state"))
        starts = GaugeMetricFamily(
            "longctx_pool_pending_starts", "Workers that autoscaling is starting", labels=("role", "stage")
        )
        for pool in self.pools:
            for state in ("live", "starting", "draining"):
                workers.add_metric([pool.role, state], getattr(pool, f"num_{state}"))
            for stage in STAGES if pool.max_workers is not None else ():
                starts.add_metric([pool.role, stage], sum(start.stage == stage for start in pool.starts))
        yield workers
        yield starts
        for name, comment, read in GAUGES:
            gauge = GaugeMetricFamily(f"longctx_pool_{name}", comment, labels=("role",))
            for pool in self.pools:
                if (value := read(pool)) is not None:
                    gauge.add_metric([pool.role], value)
            yield gauge
        for name, comment, count in COUNTERS:
            counter = CounterMetricFamily(f"longctx_pool_{name}", comment, labels=("role",))
            for pool in self.pools:
                counter.add_metric([pool.role], count(pool))
            yield counter
        yield from self._collect_queue()
        yield self._collect_latency("ttft", self._window.find_ttft)
        yield self._collect_latency("tpot", self._window.find_tpot)

    def _collect_queue(self) -> Iterable[Metric]:
        queue = self.queue
        requests = GaugeMetricFamily(
            "longctx_queue_requests", "Requests at the router, by the pool that lacks room", labels=("waits_for",)
        )
        placed_next = queue.num_waiting - queue.num_for_prefill - queue.num_for_decode
        for role, count in (("prefill", queue.num_for_prefill), ("decode", queue.num_for_decode), ("", placed_next)):
            requests.add_metric([role], count)
        yield requests
        yield GaugeMetricFamily(
            "longctx_queue_prefill_tokens", "Prompt tokens that wait for prefill workers", queue.prefill_tokens
        )

    def _collect_latency(self, name: str, find: Callable[[float, float], float | None]) -> Metric:
        gauge = GaugeMetricFamily(
            f"longctx_{name}_window_seconds",
            f"{name.upper()} of the last {WINDOW_S:g} seconds; left out without a request",
            labels=("quantile",),
        )
        for percentile in PERCENTILES:
            if (seconds := find(percentile, WINDOW_S)) is not None:
                gauge.add_metric([f"{percentile / 100:g}"], seconds)
        return gauge
