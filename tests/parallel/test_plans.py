"""What plans move, and how long they should take: the method's own table, and exhaustive search on small cases."""

import dataclasses
import math
from itertools import accumulate, product

import pytest

from parallel.links import LinkModel, load_links
from parallel.mask import Mask
from parallel.plan import PlanBuilder, Problem, make_problem
from parallel.planner import make_plan, rank_plans
from parallel.plans import PLANS
from parallel.prediction import Host, predict

LINKS = LinkModel("switch", bytes_per_s=25e6, latency_s=1e-4, flops_per_s=50e9)
MESH = LinkModel("mesh", bytes_per_s=25e6, latency_s=1e-4, flops_per_s=50e9)


def total_bytes(name: str, problem: Problem, *, backward: bool = False) -> int:
    return sum(make_plan(name, problem, LINKS).bytes_between(backward=backward).values())


def full_problem(group_size: int, *, num_q: int = 4096, causal: bool = False) -> Problem:
    """Four ranks, 8 heads of 64, fp32."""
    heads = (8, 8 // group_size, 64)
    return make_problem(Mask(causal=causal), num_q, 4096, heads, world_size=4)


@pytest.mark.parametrize("group_size", [1, 4, 8])
def test_bytes_are_those_of_the_formulas(group_size):
    """Per hop and rank: KV ring 2U/g, TokenRing U there and U(1 + 1/D) back in fp32; three hops, four ranks."""
    problem = full_problem(group_size)
    queries = 1024 * 8 * 64 * 4  # U
    hops = 3 * 4
    assert total_bytes("kv_ring", problem) == hops * 2 * queries // group_size
    assert total_bytes("kv_two_way", problem) == hops * 2 * queries // group_size
    assert total_bytes("token_ring", problem) == hops * (queries + queries * 65 // 64)
    # What the forward brought is kept where it is no more than the own U + 2U/g: three times 2U/g, or three times U.
    keys, rows = (0 if group_size >= 4 else 2), (1 if group_size == 1 else 2)
    assert total_bytes("kv_ring", problem, backward=True) == hops * (keys + 2) * queries // group_size
    assert total_bytes("token_ring", problem, backward=True) == hops * (rows * queries + 2 * queries // 64 + queries)


def test_masked_rows_do_not_travel():
    full, causal = full_problem(4), full_problem(4, causal=True)
    assert total_bytes("kv_ring", causal) <= 0.76 * total_bytes("kv_ring", full)
    cu_seqlens = (0, *accumulate([700, 300, 1100, 90, 510, 256, 640, 500]))
    packed = make_problem(Mask(cu_seqlens=cu_seqlens), 4096, 4096, (8, 2, 64), world_size=4, layout="balanced")
    assert total_bytes("fewest_bytes", packed) <= 0.5 * total_bytes("kv_ring", full)


def test_few_queries_travel_to_the_keys():
    problem = full_problem(4, num_q=256, causal=True)
    assert total_bytes("fewest_bytes", problem) <= total_bytes("kv_ring", problem) / 3


def test_predictions_agree_with_the_measured_order():
    """The table of measurements at 200 Mbit/s: who wins where."""

    def seconds(name: str, problem: Problem, links: LinkModel) -> float:
        return predict(make_plan(name, problem, links), links).seconds

    mha, gqa, few = full_problem(1), full_problem(4), full_problem(4, num_q=512, causal=True)
    assert seconds("kv_two_way", mha, MESH) < seconds("token_ring", mha, MESH) < seconds("kv_ring", mha, MESH)
    assert seconds("kv_ring", mha, LINKS) < seconds("kv_direct", mha, LINKS)
    assert 2.5 * seconds("kv_ring", gqa, LINKS) < seconds("token_ring", gqa, LINKS)
    assert 2 * seconds("token_ring", few, LINKS) < seconds("kv_ring", few, LINKS)


def test_messages_that_cost_time_count():
    problem = full_problem(4, num_q=64, causal=True)
    slow = dataclasses.replace(MESH, message_s=0.01)
    for name in PLANS:
        plan = make_plan(name, problem, MESH)
        most = max(sum(move.source == rank for move in plan.moves) for rank in range(4))
        assert predict(plan, slow).seconds >= max(predict(plan, MESH).seconds, 0.01 * (most + 1))


def test_full_links_do_not_hold_up_the_others():
    """Ulysses on a mesh: three links of each rank carry the same bytes, at the same time; then outputs come home."""
    plan = make_plan("ulysses", full_problem(1), MESH)
    on_a_link = max(plan.bytes_between().values()) / MESH.bytes_per_s
    played = predict(plan, MESH)
    assert on_a_link < played.seconds < 1.05 * (on_a_link + played.compute_s)


def test_bytes_that_cost_computing_count():
    """Links that hosts cannot keep up with: nothing is hidden, and fewer bytes beat more overlap."""
    slow = dataclasses.replace(MESH, host_byte_s=1 / MESH.bytes_per_s)
    problem = full_problem(1)
    for name in PLANS:
        plan = make_plan(name, problem, MESH)
        assert predict(plan, MESH).seconds < predict(plan, slow).seconds
        handled = [0] * 4
        for (source, destination), num_bytes in plan.bytes_between().items():
            handled[source] += num_bytes
            handled[destination] += num_bytes
        assert predict(plan, slow).seconds >= max(handled) * slow.host_byte_s
    direct = make_plan("kv_direct", problem, MESH)
    played = predict(direct, slow)
    handling_s = sum(direct.bytes_between().values()) / 2 * slow.host_byte_s  # each byte has two of four hosts
    assert played.seconds == pytest.approx(handling_s + played.compute_s, rel=0.05)


def test_computing_gets_what_messages_leave():
    host = Host()
    host.handlings = [(0.0, 2.0, 1.0), (1.0, 3.0, 1.0)]  # half of it from 0 to 1, all from 1 to 2, half from 2 to 3
    assert [host.compute(0.0, seconds) for seconds in (0.25, 0.5, 0.75, 1.0, 2.0)] == [0.5, 1.0, 2.5, 3.0, 4.0]
    assert host.compute(5.0, 1.0) == 6.0


def test_tiles_that_cost_time_count():
    problem = full_problem(4, num_q=64, causal=True)
    slow = dataclasses.replace(LINKS, tile_s=0.01)
    for name in PLANS:
        plan = make_plan(name, problem, LINKS)
        most = max(sum(len(work.tiles) for work in plan.works_of(rank)) for rank in range(4))
        for backward, times in ((False, 1.0), (True, 2.5)):
            added = predict(plan, slow, backward=backward).compute_s - predict(plan, LINKS, backward=backward).compute_s
            assert 0 < added <= most * 0.01 * times * 1.001


def test_returns_wait_only_for_moves_to_come():
    """dK and dV of ``kv_direct`` go home on a link each: the last to be computed must not wait for the first."""
    direct, ring = (make_plan(name, full_problem(4), MESH) for name in ("kv_direct", "token_ring"))
    assert not any(direct.folded_after(step, backward=True) for step in range(direct.num_steps + 1))
    long = make_problem(Mask(), 4096, 4096, (8, 2, 64), world_size=8)
    folded = [make_plan("token_ring", long, MESH).folded_after(step, backward=False) for step in range(10)]
    assert folded == [0, 0, 1, 2, 3, 4, 0, 0, 0, 0]
    assert ring.folded_after(2, backward=False) == 0
    home_s = max(direct.bytes_between(backward=True).values()) / MESH.bytes_per_s
    played = predict(direct, MESH, backward=True)
    assert home_s < played.seconds < 1.05 * (home_s + played.compute_s)


@pytest.mark.parametrize("links", [LINKS, MESH], ids=["switch", "mesh"])
@pytest.mark.parametrize("backward", [False, True])
def test_auto_takes_the_fewest_bytes_among_the_fastest(links, backward):
    for problem in (full_problem(1), full_problem(4), full_problem(4, num_q=128, causal=True)):
        ranked = rank_plans(problem, links, backward=backward)
        assert {candidate.plan.name for candidate in ranked} == set(PLANS)
        assert [c.seconds for c in ranked] == sorted(c.seconds for c in ranked)
        fastest = [c for c in ranked if c.seconds <= 1.02 * ranked[0].seconds]
        taken = next(c for c in fastest if c.plan.name == make_plan("auto", problem, links, backward=backward).name)
        assert taken.num_bytes == min(c.num_bytes for c in fastest)


@pytest.mark.parametrize("num_q", [24, 48])
@pytest.mark.parametrize("heads", [(4, 4, 8), (4, 1, 8), (6, 2, 8)], ids=["mha", "mqa", "gqa"])
@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=9), Mask(cu_seqlens=(0, 7, 30, 31, 48))])
def test_no_balanced_placement_needs_fewer_bytes(mask, heads, num_q):
    """Every pair of three ranks at every one of them, up to 3^6 ways, each fetching directly what it lacks."""
    problem = make_problem(mask, num_q, 48, heads, world_size=3, layout="zigzag")
    pairs = [pair for pair in product(range(3), repeat=2) if problem.tiles(*pair)]
    areas = {pair: sum(tile.area for tile in problem.tiles(*pair)) for pair in pairs}
    away = [pair for pair in pairs if pair[0] != pair[1]]
    most = 1.1 * max(sum(areas[pair] for pair in pairs if pair[0] == rank) for rank in range(3))
    best = math.inf
    for places in product(range(3), repeat=len(away)):
        loads = [areas.get((rank, rank), 0) for rank in range(3)]
        for pair, rank in zip(away, places, strict=True):
            loads[rank] += areas[pair]
        if max(loads) <= most:
            best = min(best, count_bytes(problem, away, places))
    assert min(total_bytes(name, problem) for name in PLANS) <= 1.05 * best


def count_bytes(problem: Problem, pairs, places) -> int:
    """What this placement moves."""
    builder, fetched = PlanBuilder("any", problem), set()
    for (q_owner, kv_owner), rank in zip(pairs, places, strict=True):
        builder.compute(q_owner, kv_owner, rank=rank, step=1)
        fetched |= {("q", q_owner, rank), ("kv", kv_owner, rank)}
    for kind, owner, rank in fetched:
        builder.hop(kind, owner, source=owner, destination=rank, step=0)
    return sum(builder.finish().bytes_between().values())


def test_links_are_saved_and_read(tmp_path):
    path = tmp_path / "links.json"
    MESH.save(path)
    assert load_links(path) == MESH
    path.write_text('{"topology": "mesh", "bandwidth": 3}')
    with pytest.raises(ValueError, match="'bandwidth' is not allowed: bytes_per_s"):
        load_links(path)
    with pytest.raises(ValueError, match="topology='ring' is not allowed: one of switch, mesh"):
        LinkModel("ring")
    path.write_text('{"bytes_per_s": "fast"}')
    with pytest.raises(ValueError, match="bytes_per_s='fast' is not allowed: a number"):
        load_links(path)


def test_uneven_nodes_are_refused():
    problem = make_problem(Mask(), 64, 64, (4, 4, 16), world_size=3, num_nodes=2)
    with pytest.raises(ValueError, match="3 ranks on 2 nodes: every node must have the same number"):
        make_plan("hybrid", problem, LINKS)
