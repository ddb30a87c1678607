"""Networks of namespaces, and the bytes that the kernel counts on them against those that plans promise."""

import json
import subprocess

import pytest

from benchmarks.networks import TOPOLOGIES, can_make_networks, make_network
from benchmarks.sequence_parallel import join_ranks, run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_networks(), reason="network namespaces take root, ip and tc"),
]
FRAMING = 1.08  # Ethernet, IP and TCP headers, acknowledgements of what the others send, gloo's own headers
PLANS = ["token_ring", "kv_ring", "kv_two_way", "ulysses", "fewest_bytes"]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_planned_bytes_are_what_the_interfaces_count(tmp_path, topology):
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    cells = [
        {"mask": "causal", "num_tokens": 1024, "num_q": 1024} | heads,
        {"mask": "packed", "num_tokens": 1024, "num_q": 1024} | heads,
        {"mask": "causal", "num_tokens": 2048, "num_q": 256} | heads,
    ]
    path = tmp_path / "specification.json"
    settings = {"engines": PLANS, "rounds": 3, "least_s": 0.0, "hidden": ["token_ring"]}
    path.write_text(json.dumps({"world_size": 3, "cells": cells} | settings))
    with make_network(3, topology, 800) as network:
        ranks = run_ranks(network, path)
    for index in range(len(cells)):
        cell = join_ranks([rank["cells"][index] for rank in ranks])
        assert set(cell["engines"]) == set(PLANS)
        assert cell["hidden"]["token_ring"]["forward"]["both_s"] > 0
        for engine in cell["engines"].values():
            assert engine["correct"], engine
            for direction in ("forward", "backward"):
                planned, sent = engine[direction]["planned_bytes"], engine[direction]["sent_bytes"]
                assert planned <= sent <= FRAMING * planned + 3 * 2**15, engine


def test_nothing_is_left_behind():
    def list_namespaces() -> str:
        return subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout

    before = list_namespaces()
    with make_network(2, "mesh", 100) as network:
        assert all(name in list_namespaces() for name in network.names)
    assert list_namespaces() == before
