"""KV shipping over a small network: every rank's pages arrive, and the times are there."""

import argparse

import pytest

from benchmarks.kv_shipping import run_network
from benchmarks.kv_shipping_rank import share_of_pages
from benchmarks.networks import can_make_networks


@pytest.mark.slow
@pytest.mark.skipif(not can_make_networks(), reason="network namespaces take root, ip and tc")
def test_two_ranks_fill_one_lease():
    arguments = argparse.Namespace(ranks=[2], rounds=2, tokens=100, layers=2, kv_heads=2, head_dim=16)
    result = run_network(arguments, "mesh", 800)
    assert result["num_bytes"] == 7 * 16 * 2 * 2 * 2 * 16 * 2  # pages, tokens, layers, K and V, heads, dim, bytes
    assert set(result["ranks"]) == {"1", "2"}
    assert all(len(way["rounds_s"]) == 2 for way in result["ranks"].values())


def test_shares_cover_all_pages_once():
    for num_ranks in (1, 2, 3, 4):
        shares = [share_of_pages(10, rank, num_ranks) for rank in range(num_ranks)]
        assert [page for share in shares for page in share] == list(range(10))
