"""Measuring links: over gloo ranks of this machine, and from seconds that a made-up network would take."""

import pytest
import torch

from parallel import link_measurement
from parallel.carrier import Carrier
from parallel.link_measurement import Measurement, measure_links
from tests.parallel.gloo_ranks import run_ranks


def measure(rank: int, world_size: int, folder: str) -> Measurement:
    link_measurement.ROUND_S = link_measurement.ATTENTION_S = 0.01
    return measure_links(None, node="here")


def test_every_rank_gets_the_same_model():
    first, second = run_ranks(measure, 2)
    assert first == second
    assert first.node_of == ("here", "here")
    assert (first.num_nodes, first.links.topology) == (1, "switch")
    assert first.links.node_bytes_per_s == 0
    for name in ("bytes_per_s", "latency_s", "flops_per_s", "tile_s"):
        assert getattr(first.links, name) > 0
    assert [rate > 0 for row in first.bytes_per_s for rate in row] == [False, True, True, False]


class Network(Carrier):
    """Rank 0 of a network in which every rank has the same links, with a clock of its own."""

    def __init__(self, world_size: int, *, is_mesh: bool, rates: list[float], now: list[float]) -> None:
        self.rank, self.world_size = 0, world_size
        self._is_mesh, self._rates, self._now = is_mesh, rates, now

    def post(self, sends, receives):
        times = [message.buffer.numel() / self._rates[message.peer - 1] for message in sends]
        self._now[0] += max(times) if self._is_mesh else sum(times)
        return [], []

    def gather_numbers(self, numbers, timeout_s):
        return [list(numbers)] * self.world_size


def attend_in_no_time(carrier: Carrier, device: torch.device, length: int) -> float:
    return 0.5 if length == 1024 else 1e-4


@pytest.mark.parametrize(("is_mesh", "topology"), [(False, "switch"), (True, "mesh")])
def test_topology_and_nodes(monkeypatch, is_mesh, topology):
    """Ranks 0 and 1 on one node: as rank 0 sees it, only rank 1 is near."""
    now = [0.0]
    network = Network(4, is_mesh=is_mesh, rates=[8e6, 8e6, 8e6], now=now)
    monkeypatch.setattr(link_measurement, "open_carrier", lambda group, device: network)
    monkeypatch.setattr(link_measurement.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(link_measurement, "_measure_attention", attend_in_no_time)
    monkeypatch.setattr(link_measurement, "_measure_handling", lambda carrier, device, num_bytes, slowest_s: 0.0)
    measured = measure_links(None, node="a", device=torch.device("cpu"))
    assert measured.links.topology == topology
    assert measured.links.bytes_per_s == pytest.approx(8e6, rel=0.01)
    assert measured.links.flops_per_s == pytest.approx(4 * 1024 * 1024 * 8 * 64 / 0.5)
    assert measured.links.tile_s == pytest.approx(1e-4)


def test_messages_cost_what_they_add(monkeypatch):
    """Alone a message takes 8 ms; two more, each way, take 2 ms apiece on top."""
    now = [0.0]

    class Busy(Network):
        def post(self, sends, receives):
            self._now[0] += 0.006 + 0.001 * (len(sends) + len(receives))
            return [], []

    network = Busy(4, is_mesh=True, rates=[], now=now)
    monkeypatch.setattr(link_measurement, "open_carrier", lambda group, device: network)
    monkeypatch.setattr(link_measurement.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(link_measurement, "MOST_BYTES", 1 << 17)
    monkeypatch.setattr(link_measurement, "_measure_attention", attend_in_no_time)
    monkeypatch.setattr(link_measurement, "_measure_handling", lambda carrier, device, num_bytes, slowest_s: 0.0)
    links = measure_links(None, node="a").links
    assert links.latency_s == pytest.approx(0.008)
    assert links.message_s == pytest.approx(0.001)


@pytest.mark.parametrize(("is_mesh", "topology"), [(False, "switch"), (True, "mesh")])
def test_links_that_hosts_cannot_keep_up_with(monkeypatch, is_mesh, topology):
    """A byte keeps either end busy for a fifth of its time on a link: three links at once take 1.2 times as long."""
    now = [0.0]

    class Slow(Network):
        def post(self, sends, receives):
            begun, size = now[0], sends[0].buffer.numel()
            super().post(sends, receives)
            now[0] = max(now[0], begun + 2 * len(sends) * size / 8e6 / 5)
            return [], []

    network = Slow(4, is_mesh=is_mesh, rates=[8e6, 8e6, 8e6], now=now)
    handling_s = lambda carrier, device, num_bytes, slowest_s: 6 * num_bytes / 8e6 / 5  # noqa: E731
    monkeypatch.setattr(link_measurement, "open_carrier", lambda group, device: network)
    monkeypatch.setattr(link_measurement.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(link_measurement, "_measure_attention", attend_in_no_time)
    monkeypatch.setattr(link_measurement, "_measure_handling", handling_s)
    links = measure_links(None, node="a").links
    assert links.topology == topology
    assert links.host_byte_s == pytest.approx(1 / 8e6 / 5)


def test_nodes_count_only_in_order():
    def count(*node_of: str) -> int:
        return Measurement(link_measurement.LinkModel(), node_of, (), 1.0).num_nodes

    assert count("a", "a", "b", "b") == 2
    assert count("a", "b", "a", "b") == 1
    assert count("a", "a", "b") == 1


def test_one_rank_has_no_links(monkeypatch):
    monkeypatch.setattr(
        link_measurement, "open_carrier", lambda group, device: Network(1, is_mesh=False, rates=[], now=[0.0])
    )
    with pytest.raises(ValueError, match="a group of 1 rank is not allowed"):
        measure_links(None, node="a")
