"""Prometheus metrics: what requests experienced, and at each scrape the state of every worker.

Each endpoint has a registry of its own, so that two in one process do not mix.
"""

import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.autoscale.latency_window import LatencyWindow
from cluster.pool_metrics import PoolMetrics
from cluster.serving import PoolStatus, QueueStats, WorkerStats
from cluster.slo_limit import SloLimit
from longctx.messages import OutputDelta

# Half a million tokens of prompt take minutes; a token takes a millisecond on a GPU and seconds behind a long prefill.
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
TPOT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.4, 0.8, 1.6, 5, 20)
REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 3600)

# Name, what it says, how it is read. Names follow the fields of EngineStats.
GAUGES: tuple[tuple[str, str, Callable[[WorkerStats], float]], ...] = (
    ("num_waiting", "Requests that have not started", lambda worker: worker.engine.num_waiting),
    ("num_running", "Sequences that hold pages", lambda worker: worker.engine.num_running),
    (
        "pending_prefill_tokens",
        "Prompt tokens still to be computed",
        lambda worker: worker.engine.pending_prefill_tokens,
    ),
    ("num_pages", "Pages of the KV pool", lambda worker: worker.engine.num_pages),
    ("num_pages_used", "Pages held by a sequence or a lease", lambda worker: worker.engine.num_pages_used),
    ("num_pages_cached", "Free pages that still hold a shared prefix", lambda worker: worker.engine.num_pages_cached),
    ("page_size", "Tokens per page", lambda worker: worker.engine.page_size),
    ("kv_bytes", "KV budget in bytes", lambda worker: worker.engine.kv_bytes),
    ("worker_mixed", "1 while it has work that it was not started for", lambda worker: float(worker.pool == "mixed")),
    ("worker_alive", "1 while the worker answers", lambda worker: float(worker.alive)),
)
COUNTERS: tuple[tuple[str, str, Callable[[WorkerStats], float]], ...] = (
    ("kv_bytes_shipped", "KV bytes sent to other workers", lambda worker: worker.bytes_shipped),
    ("prompts_shipped", "Prompts whose KV other workers have acknowledged", lambda worker: worker.num_shipped),
    (
        "kv_residual_seconds",
        "Of all prompts shipped: from the first token to the acknowledgement of their KV",
        lambda worker: worker.residual_s,
    ),
    ("preemptions", "Sequences preempted for want of pages", lambda worker: worker.engine.num_preemptions),
    ("prompt_tokens", "Prompt tokens taken in", lambda worker: worker.engine.num_prompt_tokens),
    ("cached_tokens", "Prompt tokens found in the prefix cache", lambda worker: worker.engine.num_cached_tokens),
    ("generated_tokens", "Tokens generated", lambda worker: worker.engine.num_generated_tokens),
    ("loaded_pages", "Pages found in engine.prefix_folder", lambda worker: _detail(worker, "num_loaded_pages")),
    ("saved_pages", "Pages written to it", lambda worker: _detail(worker, "num_saved_pages")),
    ("dropped_pages", "Pages left out for want of time or room", lambda worker: _detail(worker, "num_dropped_pages")),
    ("damaged_pages", "Files there that were not as written", lambda worker: _detail(worker, "num_damaged_pages")),
)
LABELS = ("worker", "role")


def _detail(worker: WorkerStats, name: str) -> float:
    return worker.engine.details.get(name, 0.0)


class Metrics:
    """Everything ``/metrics`` shows."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.ttft = Histogram(
            "longctx_ttft_seconds",
            "From a request's arrival to its first token",
            ["worker"],
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.tpot = Histogram(
            "longctx_tpot_seconds",
            "Mean time of each further token of a prompt's sequences",
            ["worker"],
            buckets=TPOT_BUCKETS_S,
            registry=registry,
        )
        self.request_time = Histogram(
            "longctx_request_seconds",
            "From a request's arrival to the end of its answer",
            ["endpoint"],
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.requests = Counter(
            "longctx_requests", "Requests by how they ended", ["endpoint", "outcome"], registry=registry
        )
        self.in_progress = Gauge("longctx_requests_in_progress", "Requests being served or waiting", registry=registry)
        self._limit = Gauge("longctx_requests_limit", "Requests that may be in progress", registry=registry)
        self._judged = Counter(
            "longctx_slo_requests", "Requests by whether they kept a target", ["target", "met"], registry=registry
        )
        self.window = LatencyWindow()
        self._slo: SloLimit | None = None
        self._workers, self._pools = _WorkerCollector(), PoolMetrics(self.window)
        registry.register(self._workers)
        registry.register(self._pools)
        self._registry = registry

    def follow(self, slo: SloLimit, read_limit: Callable[[], float]) -> None:
        """Tell ``slo`` of latencies too, and show what comes of it."""
        self._slo = slo
        self._limit.set_function(read_limit)

    def note_judged(self, target: str, has_kept: bool) -> None:
        """A request kept a target, or missed it."""
        self._judged.labels(target, str(has_kept).lower()).inc()

    def note_ttft(self, seconds: float, num_prompt_tokens: int, *, started: float) -> None:
        """A request that arrived at ``started`` has its first token."""
        self.window.add_ttft(seconds, num_prompt_tokens)
        if self._slo is not None:
            self._slo.note_ttft(seconds, num_prompt_tokens, started=started)

    def note_tpot(self, seconds: float, *, started: float) -> None:
        """A sequence has ended that took so long for each token after its first."""
        self.window.add_tpot(seconds)
        if self._slo is not None:
            self._slo.note_tpot(seconds, started=started)

    def render(
        self, workers: Sequence[WorkerStats], pools: Sequence[PoolStatus] = (), queue: QueueStats | None = None
    ) -> bytes:
        """The text format, with what is given as it is now."""
        self._workers.workers = workers
        self._pools.pools, self._pools.queue = pools, queue or QueueStats()
        return generate_latest(self._registry)


class TokenTimer:
    """Times one prompt's tokens and records TTFT and TPOT.

    Args:
        metrics: where to record.
        started: ``time.perf_counter()`` at the request's arrival.
        num_prompt_tokens: of the prompt.
    """

    def __init__(self, metrics: Metrics, started: float, num_prompt_tokens: int = 0) -> None:
        self._metrics = metrics
        self._started = started
        self._num_prompt_tokens = num_prompt_tokens
        self._first: dict[int, float] = {}  # by sequence
        self._num_tokens: dict[int, int] = {}
        self.worker = ""

    def record(self, delta: OutputDelta, worker_of: Callable[[str], str]) -> None:
        """Account for ``delta``, just arrived."""
        if not delta.token_ids and delta.finish_reason is None:
            return
        now = time.perf_counter()
        if not self._first:
            self.worker = worker_of(delta.request_id)
            self._metrics.ttft.labels(self.worker).observe(now - self._started)
            self._metrics.note_ttft(now - self._started, self._num_prompt_tokens, started=self._started)
        first = self._first.setdefault(delta.index, now)
        num_tokens = self._num_tokens[delta.index] = self._num_tokens.get(delta.index, 0) + len(delta.token_ids)
        if delta.finish_reason is not None and num_tokens > 1:
            tpot = (now - first) / (num_tokens - 1)
            self._metrics.tpot.labels(self.worker).observe(tpot)
            self._metrics.note_tpot(tpot, started=self._started)


class _WorkerCollector(Collector):
    """The workers' state, read by the registry; ``workers`` is set just before each scrape."""

    def __init__(self) -> None:
        self.workers: Sequence[WorkerStats] = ()

    def collect(self) -> Iterable[Metric]:
        for name, comment, read in GAUGES:
            gauge = GaugeMetricFamily(f"longctx_{name}", comment, labels=LABELS)
            for worker in self.workers:
                gauge.add_metric([worker.name, worker.role], read(worker))
            yield gauge
        for name, comment, read in COUNTERS:
            counter = CounterMetricFamily(f"longctx_{name}", comment, labels=LABELS)
            for worker in self.workers:
                counter.add_metric([worker.name, worker.role], read(worker))
            yield counter
        yield self._collect_info()

    def _collect_info(self) -> Metric:
        info = InfoMetricFamily("longctx_worker", "What runs where", labels=LABELS)
        for worker in self.workers:
            engine = worker.engine
            where = {"host": worker.host, "pid": str(worker.pid), "transport": worker.transport}
            info.add_metric(
                [worker.name, worker.role], where | _describe(engine.attention, engine.device, engine.dtype)
            )
        return info


def _describe(attention: str, device: str, dtype: str) -> dict[str, str]:
    return {"attention": attention, "device": device, "dtype": dtype}
