"""Where Ray puts the ranks of a worker: together, and on nodes of its kind."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table, remove_placement_group

from cluster.actors import _await_place, _place
from cluster.resources import Needs

STORE = 80 * 2**20
cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
)
try:
    for kind in ("fast", "fast", "slow"):
        cluster.add_node(num_cpus=4, object_store_memory=STORE, labels={"kind": kind}, resources={kind: 2})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    kinds = {node["NodeID"]: node["Labels"].get("kind") for node in ray.nodes()}

    def place(number, needs, num_ranks=2):
        group = _place(f"test/decode-{number}", num_ranks, needs, "PACK", False)
        _await_place(group, num_ranks, needs)
        return group, list(placement_group_table(group)["bundles_to_node_id"].values())

    def spread(needs):
        placed = [place(number, needs) for number in range(2)]
        for group, _ in placed:
            remove_placement_group(group)
        nodes = [nodes for _, nodes in placed]
        assert all(len(set(each)) == 1 for each in nodes), nodes
        return {kinds[each[0]] for each in nodes}

    spread(Needs(1.0, 0.0))
    assert spread(Needs(1.0, 0.0, labels={"kind": "fast"})) == {"fast"}
    assert spread(Needs(1.0, 0.0, {"fast": 1.0})) == {"fast"}
    _, nodes = place(9, Needs(1.0, 0.0, labels={"kind": "!fast"}), num_ranks=4)
    assert {kinds[node] for node in nodes} == {"slow"}
    print("placed")
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def test_ranks_are_together():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["placed"], done.stdout + done.stderr
