"""A slice of the matrix on hosts of their own; ``python -m tests.multihost.matrix`` runs all of it."""

import json

import pytest

from benchmarks.networks import can_make_networks
from tests.cluster.fault_matrix import is_good
from tests.multihost.hosts import start_hosts
from tests.multihost.matrix import OVERRIDES, run_cell

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_networks(), reason="network namespaces take root, ip and tc"),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with start_hosts(tmp_path_factory.mktemp("hosts"), *OVERRIDES) as hosts:
        yield hosts


@pytest.mark.parametrize("role, fault", [("decode", "cut"), ("prefill", "mute"), ("decode", "kill")])
def test_nobody_notices_but_time(hosts, role, fault):
    result = run_cell(hosts, role, fault, seed=3)
    assert is_good(result), json.dumps(result)
