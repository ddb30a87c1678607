"""The simulated fleet: what one machine alone does is arithmetic, and what many do follows the router's policies."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest

from cluster.fleet.config import FleetConfig, PlanClusterConfig, TraceConfig
from cluster.fleet.search import find_highest_rate, other_splits
from cluster.fleet.simulation import FleetPlan, simulate
from cluster.fleet.slo import LIMITS, measure
from cluster.fleet.trace import QUANTILES, SHAPES, TracedRequest, draw_trace, load_trace
from cluster.plan_cluster import PROFILES, plan_cluster
from cluster.policies import POLICIES
from longctx.errors import ConfigError
from longctx.machine_profile import MachineProfile, load_profile, read_profile, save_profile

# 1 ms a prompt token, 10 ms a decode step and 1 ms more for each further sequence
SIMPLE = MachineProfile(
    "simple", ((100, 0.1), (1000, 1.0)), ((1, 0.010), (2, 0.011)), kv_tokens=100_000, max_batch_tokens=1000
)


def one(prefill=0, decode=1, policy="shortest_queue", profile=SIMPLE, local=0):
    return FleetPlan(((profile, prefill),) if prefill else (), ((profile, decode),), policy, local)


def times(run):
    return [(round(job.first_token_s, 6), round(job.end_s, 6)) for job in run.jobs]


def test_one_request_alone():
    assert times(simulate(one(), [TracedRequest(2.0, 500, 11)])) == [(2.5, 2.6)]
    assert times(simulate(one(), [TracedRequest(0.0, 2500, 1)])) == [(2.5, 2.5)]  # three steps


def test_two_that_decode_together_take_a_step_together():
    run = simulate(one(), [TracedRequest(0.0, 100, 11), TracedRequest(0.0, 100, 6)])
    # the second prompt's step takes 1 ms more, beside the first sequence; then five steps of 11 ms and four of 10
    assert times(run) == [(0.1, 0.296), (0.201, 0.256)]


def test_a_prompt_cuts_decode_steps_short():
    run = simulate(one(), [TracedRequest(0.0, 100, 101), TracedRequest(0.305, 100, 2)])
    # the step that began at 0.3 ends at 0.31; one with the prompt and one decoding sequence takes 0.1 + 0.001
    assert times(run)[1] == (0.411, 0.422)


def test_kv_travels_layer_by_layer():
    slow = replace(SIMPLE, kv_bytes_per_token=1000, num_layers=10, network_bytes_s=1e6)  # 0.1 s for 100 tokens
    for profile, residual in ((slow, 0.01), (replace(slow, network_bytes_s=5e5), 0.1), (SIMPLE, 0.0)):
        run = simulate(one(1, 1, profile=profile), [TracedRequest(0.0, 100, 2)])
        assert times(run) == [(round(0.1 + residual, 6), round(0.11 + residual, 6))]


def test_a_short_prompt_has_half_of_the_steps_beside_a_long_one():
    run = simulate(one(), [TracedRequest(0.0, 100_000 - 200, 1), TracedRequest(0.5, 100, 1)])
    assert times(run)[1][0] == 2.0  # it joins the step that begins at 1.0


def test_decode_machines_that_are_full_let_requests_wait():
    small = replace(SIMPLE, kv_tokens=250)
    run = simulate(one(profile=small), [TracedRequest(0.0, 100, 101), TracedRequest(0.0, 100, 101)])
    [(_, first_end), (second_first, _)] = times(run)
    assert second_first == pytest.approx(first_end + 0.1)


@pytest.mark.parametrize("policy", tuple(POLICIES))
@pytest.mark.parametrize("shape", tuple(SHAPES))
def test_every_request_ends_once(policy, shape):
    profile = load_profile("llama2-70b-dgx-h100", PROFILES)
    trace = draw_trace(SHAPES[shape], rate=20.0, duration_s=30.0, seed=3)
    run = simulate(FleetPlan(((profile, 3),), ((profile, 4),), policy), trace)
    assert len(run.jobs) == len(trace)
    for job, request in zip(run.jobs, trace, strict=True):
        alone_s = profile.prompt_time(request.num_prompt_tokens)
        assert job.request is request
        assert request.arrival_s + 0.5 * alone_s <= job.first_token_s <= job.end_s < math.inf
        assert (job.end_s == job.first_token_s) == (request.num_output_tokens == 1)
    assert run.duration_s >= max(job.end_s for job in run.jobs)
    again = simulate(FleetPlan(((profile, 3),), ((profile, 4),), policy), trace)
    assert times(again) == times(run)


def test_the_mixed_pool_takes_what_its_own_pool_cannot():
    trace = [TracedRequest(0.001 * number, 3000, 2) for number in range(12)]
    ends = {}
    for policy in ("shortest_queue", "splitwise"):
        run = simulate(one(1, 3, policy=policy), trace)
        ends[policy] = run.duration_s
        assert (run.mixed_share > 0) == (policy == "splitwise")
    assert ends["shortest_queue"] == pytest.approx(36.01, abs=0.02)
    assert ends["splitwise"] < 0.6 * ends["shortest_queue"]


def test_who_has_not_ended_has_missed():
    run = simulate(one(), [TracedRequest(0.0, 5000, 2)] * 10, patience_s=6.0)
    latencies = measure(run.jobs, SIMPLE)
    assert latencies.seconds["ttft"][-1] == math.inf
    assert not latencies.meets_all
    assert any(text.startswith("ttft p99 inf") for text in latencies.missed)


def test_alone_is_1x():
    run = simulate(one(), [TracedRequest(10.0 * number, 100 + number, 20) for number in range(20)])
    latencies = measure(run.jobs, SIMPLE)
    assert latencies.meets_all
    for name in LIMITS:
        assert latencies.slowdowns[name] == pytest.approx((1.0, 1.0, 1.0), abs=1e-9)


def test_the_highest_rate_is_where_the_objectives_fail():
    def make(rate):
        return draw_trace(SHAPES["azure_conversation"], rate=rate, duration_s=20.0, seed=0)

    fast = replace(SIMPLE, prompt_times=((100, 0.001), (1000, 0.01)))
    rate, points = find_highest_rate(one(profile=fast), 1.0, make, fast)
    good = [point.rate for point in points if point.latencies.meets_all]
    bad = [point.rate for point in points if not point.latencies.meets_all]
    assert rate == max(good) and min(each for each in bad if each > rate) <= 1.03 * rate
    splits = list(other_splits(one(3, 5)))
    assert [sum(count for _, count in split.prefill) for split in splits] == list(range(8))
    assert {len(split.machines) for split in splits} == {8}


@pytest.mark.parametrize("shape", tuple(SHAPES))
def test_a_shape_has_its_quantiles(shape):
    trace = draw_trace(SHAPES[shape], rate=100.0, duration_s=600.0, seed=1, steady=True)
    for name in ("prompt_tokens", "output_tokens"):
        values = sorted(getattr(request, f"num_{name}") for request in trace)
        for quantile, expected in list(zip(QUANTILES, getattr(SHAPES[shape], name), strict=True))[1:4]:
            assert values[int(quantile * len(values))] == pytest.approx(expected, rel=0.1)
    gaps = [later.arrival_s - sooner.arrival_s for sooner, later in pairwise(trace)]
    assert len(trace) == pytest.approx(60_000, rel=0.05)
    assert all(gap >= 0 for gap in gaps)


def test_a_trace_of_a_file(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [{"arrival_s": 10 + 2 * n, "num_prompt_tokens": n + 1, "num_output_tokens": 2} for n in (2, 0, 1)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [each.arrival_s for each in load_trace(path)] == [0.0, 2.0, 4.0]
    assert [each.arrival_s for each in load_trace(path, rate=1.0)] == [0.0, 1.0, 2.0]
    for text, words in (("", "no request"), ('{"arrival_s": 1}', "trace.jsonl:1"), ("[]", ":1"), ("x", ":1")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_trace(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_trace(tmp_path / "none.jsonl")


def test_profiles_are_checked(tmp_path):
    path = tmp_path / "mine.json"
    save_profile(SIMPLE, path)
    assert load_profile(str(path), PROFILES) == SIMPLE
    with pytest.raises(ConfigError, match="llama2-70b-dgx-a100"):
        load_profile("unknown", PROFILES)
    content = json.loads(path.read_text())
    for change in ({"extra": 1}, {"prompt_times": [[1, 1.0]]}, {"token_times": [[2, 1], [1, 1]]}, {"token_times": "x"}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            read_profile(content | change, "mine")
    for name in PROFILES.glob("*.json"):
        assert load_profile(name.stem, PROFILES).source


FLEET = FleetConfig(prefill=["llama2-70b-dgx-h100:2"], decode=["llama2-70b-dgx-h100:2"])


def test_the_command(tmp_path, capsys):
    config = PlanClusterConfig(
        FLEET,
        TraceConfig(rate=2.0, duration_s=10.0),
        splits=True,
        find_rate=True,
        picture=str(tmp_path / "fleet.png"),
        json_file=str(tmp_path / "fleet.json"),
    )
    assert plan_cluster(config) == 0
    text = capsys.readouterr().out
    assert "best: " in text and "all met" in text and "TTFT 2/3/6x" in text
    content = json.loads((tmp_path / "fleet.json").read_text())
    assert [each["prefill"].get("llama2-70b-dgx-h100", 0) for each in content["best"]] == [0, 1, 2, 3]
    assert (tmp_path / "fleet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "fleet, trace, other, words",
    [
        ({"decode": []}, {}, {}, "fleet.decode"),
        ({"decode": ["llama2-70b-dgx-h100"]}, {}, {}, "PROFILE:COUNT"),
        ({"decode": ["llama2-70b-dgx-h100:0"]}, {}, {}, "PROFILE:COUNT"),
        ({"prefill": ["nothing:2"]}, {}, {}, "nothing"),
        ({"reference": "nothing"}, {}, {}, "nothing"),
        ({"prefill": ["llama2-70b-dgx-a100:1"]}, {}, {"splits": True}, "several kinds"),
        ({}, {"rate": None}, {}, "trace.rate"),
        ({}, {"rate": 0.001, "duration_s": 0.001}, {}, "not a single request"),
        ({}, {}, {"picture": "fleet.jpg"}, "NAME.png"),
        ({}, {}, {"picture": "/nowhere/fleet.png"}, "cannot be written"),
    ],
)
def test_mistakes_are_named(fleet, trace, other, words):
    config = PlanClusterConfig(
        replace(FLEET, **fleet), replace(TraceConfig(rate=2.0, duration_s=5.0), **trace), **other
    )
    with pytest.raises(ConfigError, match=words):
        plan_cluster(config)
