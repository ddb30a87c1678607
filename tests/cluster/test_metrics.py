"""`/metrics`, `/health` and `/status` tell what happened."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.autoscale.latency_window import LatencyWindow
from cluster.delta_buffer import MERGE_ABOVE, DeltaBuffer
from cluster.metrics import Metrics, TokenTimer
from cluster.serving import PoolStatus, QueueStats, StartStatus, WorkerStats
from longctx.messages import EngineStats, FinishReason, OutputDelta
from tests.local_server import MODEL_NAME, LocalServer, serve
from tests.tiny_checkpoints import make_checkpoint

PROMPT = {"model": MODEL_NAME, "prompt": "x" * 64, "max_tokens": 8, "ignore_eos": True, "seed": 1}
ENGINE = {"worker": "engine-0", "role": "engine"}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[LocalServer]:
    with serve(make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", seed=3)) as running:
        yield running


def read_samples(text: str) -> dict[tuple[str, frozenset], float]:
    families = text_string_to_metric_families(text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_requests_and_tokens_are_counted(server):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for _ in range(3):
            client.post("/v1/completions", json=PROMPT).raise_for_status()
        client.post("/v1/completions", json=PROMPT | {"n": 0})
        client.post("/v1/completions", json=PROMPT | {"model": "other"})
        samples = read_samples(client.get("/metrics").text)

    def get(name: str, **labels: str) -> float:
        return samples[name, frozenset(labels.items())]

    path = "/v1/completions"
    assert get("longctx_requests_total", endpoint=path, outcome="ok") == 3
    assert get("longctx_requests_total", endpoint=path, outcome="invalid") == 2
    assert get("longctx_request_seconds_count", endpoint=path) == 5
    assert get("longctx_ttft_seconds_count", worker="engine-0") == 3
    assert get("longctx_tpot_seconds_count", worker="engine-0") == 3
    assert get("longctx_requests_in_progress") == 0
    assert get("longctx_generated_tokens_total", **ENGINE) == 24
    assert get("longctx_prompt_tokens_total", **ENGINE) == 3 * 64
    assert get("longctx_cached_tokens_total", **ENGINE) == 2 * 48
    assert get("longctx_kv_bytes_shipped_total", **ENGINE) == 0
    assert get("longctx_loaded_pages_total", **ENGINE) == get("longctx_damaged_pages_total", **ENGINE) == 0
    assert get("longctx_num_pages", **ENGINE) == server.engine.pool.num_pages
    assert get("longctx_num_pages_used", **ENGINE) == 0
    assert get("longctx_num_pages_cached", **ENGINE) >= 4
    assert get("longctx_page_size", **ENGINE) == 16


def test_health_and_status(server):
    health = httpx.get(f"{server.url}/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ready"
    status = httpx.get(f"{server.url}/status").json()
    (worker,) = status["workers"]
    assert status["ready"]
    assert status["model"]["id"] == MODEL_NAME
    assert (worker["name"], worker["role"]) == ("engine-0", "engine")
    assert worker["engine"]["attention"] == "torch"
    assert worker["engine"]["device"] == "cpu"


def test_workers_are_labelled():
    stats = [
        WorkerStats("prefill-0", "prefill", EngineStats(num_waiting=3), bytes_shipped=4096, transport="tcp"),
        WorkerStats("decode-0", "decode", EngineStats(num_running=7, num_preemptions=2), alive=False),
    ]
    samples = read_samples(Metrics().render(stats).decode())

    def get(name: str, worker: WorkerStats) -> float:
        return samples[name, frozenset({("worker", worker.name), ("role", worker.role)})]

    prefill, decode = stats
    assert get("longctx_kv_bytes_shipped_total", prefill) == 4096
    assert get("longctx_num_waiting", prefill) == 3
    assert get("longctx_num_running", decode) == 7
    assert get("longctx_preemptions_total", decode) == 2
    assert (get("longctx_worker_alive", prefill), get("longctx_worker_alive", decode)) == (1, 0)


def test_pools_and_the_queue_are_shown():
    metrics = Metrics()
    metrics.window.add_ttft(2.0, 100)
    start = StartStatus("decode-1", "placing", 3.0)
    pools = [
        PoolStatus("prefill", num_live=2),
        PoolStatus("decode", 1, 1, 0, min_workers=1, max_workers=4, target_workers=2, starts=(start,), num_grown=1),
    ]
    samples = read_samples(metrics.render([], pools, QueueStats(9, 2, 3, 7000)).decode())

    def get(name: str, **labels: str) -> float:
        return samples[name, frozenset(labels.items())]

    assert get("longctx_pool_workers", role="prefill", state="live") == 2
    assert get("longctx_pool_workers", role="decode", state="starting") == 1
    assert get("longctx_pool_pending_starts", role="decode", stage="placing") == 1
    assert get("longctx_pool_target_workers", role="decode") == 2
    assert ("longctx_pool_target_workers", frozenset({("role", "prefill")})) not in samples
    assert get("longctx_pool_grown_total", role="decode") == 1
    assert [get("longctx_queue_requests", waits_for=role) for role in ("prefill", "decode", "")] == [2, 3, 4]
    assert get("longctx_queue_prefill_tokens") == 7000
    assert get("longctx_ttft_window_seconds", quantile="0.9") == 2.0
    assert not any(name == "longctx_tpot_window_seconds" for name, _ in samples)


def test_the_window_forgets():
    now = [0.0]
    window = LatencyWindow(lambda: now[0])
    for second in range(100):
        now[0] = float(second)
        window.add_ttft(second / 100, second)
        window.add_tpot(second / 1000)
    assert window.find_ttft(50.0, 9.0) == 0.94  # ten samples, the fifth
    assert window.find_ttft(100.0, 1000.0, above=20, at_most=30) == 0.3
    assert window.find_tpot(10.0, 9.0) == 0.09
    assert window.find_ttft(90.0, 1000.0, above=500) is None
    now[0] = 200.0
    assert window.find_tpot(90.0, 30.0) is None


def test_tpot_is_the_mean_of_the_later_tokens(monkeypatch):
    metrics = Metrics()
    now = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr("cluster.metrics.time.perf_counter", lambda: next(now))
    timer = TokenTimer(metrics, started=9.0)
    steps: list[tuple[int, FinishReason | None]] = [(1, None), (1, None), (3, "stop")]
    for num_tokens, finish_reason in steps:
        delta = OutputDelta("r", 0, (65,) * num_tokens, "", finish_reason=finish_reason)
        timer.record(delta, lambda _: "w")
    samples = read_samples(metrics.render([]).decode())
    assert samples["longctx_ttft_seconds_sum", frozenset({("worker", "w")})] == 1.0
    assert samples["longctx_tpot_seconds_sum", frozenset({("worker", "w")})] == 0.5


def test_unread_deltas_are_merged():
    """What nobody reads stays one delta per sequence, and nothing of it is lost."""
    buffer = DeltaBuffer()
    num_steps = 50 * MERGE_ABOVE
    for step in range(num_steps):
        last = step == num_steps - 1
        buffer.put(
            OutputDelta(
                "r",
                index,
                (step,),
                f"{step};",
                finish_reason="length" if last else None,
                num_cached_tokens=3 * (step == 0),
            )
            for index in range(2)
        )
        assert len(buffer._pending) <= MERGE_ABOVE + 2
    pending = asyncio.run(buffer.take(1.0))
    assert [delta.index for delta in pending] == [0, 1]
    for delta in pending:
        assert delta.token_ids == tuple(range(num_steps))
        assert delta.text == "".join(f"{step};" for step in range(num_steps))
        assert delta.finish_reason == "length"
        assert delta.num_cached_tokens == 3
