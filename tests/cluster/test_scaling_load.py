"""What counts for which pool."""

from dataclasses import replace

import pytest

from cluster.autoscale.config import AutoscaleConfig, PrefillScaling
from cluster.autoscale.load import measure_pool
from cluster.config import ClusterConfig, PrefillConfig, ServeConfig
from cluster.messages import Observation
from cluster.serving import QueueStats, WorkerStats
from longctx.messages import EngineStats

SCALING = AutoscaleConfig(enabled=True, ttft_target_s=2.0, tpot_target_s=0.1)
CONFIG = ServeConfig(cluster=ClusterConfig(autoscale=SCALING))
ALONE = replace(CONFIG, cluster=replace(CONFIG.cluster, num_prefill_workers=0))


def worker(name, *, alive=True, draining=False, pool="", **engine):
    role = name.partition("-")[0]
    stats = EngineStats(num_pages=100, **engine)
    return WorkerStats(name, role, stats, alive=alive, draining=draining, pool=pool or role)


WORKERS = (
    worker("prefill-0", pending_prefill_tokens=1000, num_running=1, num_waiting=2),
    worker("prefill-1", pending_prefill_tokens=500, draining=True),
    worker("decode-0", num_pages_used=80, num_running=5, num_waiting=1, pending_prefill_tokens=7),
    worker("decode-1", num_pages_used=10, alive=False),
)
QUEUE = QueueStats(num_waiting=9, num_for_prefill=4, num_for_decode=3, prefill_tokens=6000)
SEEN = Observation(WORKERS, QUEUE, ttft_s=0.5, long_ttft_s=3.0, tpot_s=0.2)


def totals(load):
    return {demand.name: demand.total for demand in load.demands}


def test_prompts_wait_for_prefill_workers():
    load = measure_pool(SEEN, CONFIG, "prefill")
    assert (load.num_live, load.num_starting, load.num_draining, load.num_jobs) == (1, 0, 1, 7)
    assert totals(load) == {"pending prompt tokens": 7000}
    assert load.demands[0].per_worker == 4 * CONFIG.engine.max_batch_tokens  # what the router gives one at a time


def test_a_mark_and_ranks():
    own = replace(CONFIG.cluster, prefill=PrefillConfig(sp_degree=4, max_batch_tokens=1024))
    (demand,) = measure_pool(SEEN, replace(CONFIG, cluster=own), "prefill").demands
    assert demand.per_worker == 4 * 1024 * 4
    own = replace(own, autoscale=replace(SCALING, prefill=PrefillScaling(max_pending_tokens=5)))
    (demand,) = measure_pool(SEEN, replace(CONFIG, cluster=own), "prefill").demands
    assert demand.per_worker == 5


def test_room_is_what_decode_workers_lack():
    load = measure_pool(SEEN, CONFIG, "decode")
    assert (load.num_live, load.num_starting, load.num_draining, load.num_jobs) == (1, 1, 0, 9)
    assert totals(load) == {"KV pages": 80, "requests without room": 4}
    assert [demand.per_worker for demand in load.demands] == pytest.approx([85.0, 1.0])


def test_without_prefill_workers_decode_workers_answer_for_prompts():
    load = measure_pool(SEEN, ALONE, "decode")
    assert totals(load)["pending prompt tokens"] == 7
    assert [(each.name, each.seconds) for each in load.latencies] == [("TPOT p90", 0.2), ("TTFT p90", 3.0)]


def test_each_pool_answers_for_its_own_latency():
    calm = replace(SEEN, queue=QueueStats())
    assert [each.seconds for each in measure_pool(calm, CONFIG, "prefill").latencies] == [3.0]
    assert measure_pool(SEEN, CONFIG, "prefill").latencies == ()  # prompts wait for room to be decoded
    assert [each.seconds for each in measure_pool(SEEN, CONFIG, "decode").latencies] == [0.2, 0.5]


def test_what_mixed_workers_compute_counts_for_prefill():
    mixed = replace(SEEN, workers=(*WORKERS, worker("decode-2", pool="mixed", pending_prefill_tokens=300)))
    assert totals(measure_pool(mixed, CONFIG, "prefill"))["pending prompt tokens"] == 7300


def test_what_was_begun_counts_before_it_is_seen():
    load = measure_pool(SEEN, CONFIG, "decode", starting=["decode-0", "decode-7"], num_unnamed=1, draining=["decode-1"])
    assert (load.num_live, load.num_starting, load.num_draining) == (0, 3, 1)
    undone = measure_pool(SEEN, CONFIG, "prefill", starting=["prefill-1"])
    assert (undone.num_live, undone.num_starting, undone.num_draining) == (1, 1, 0)
