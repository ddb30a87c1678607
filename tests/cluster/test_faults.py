"""A slice of the fault matrix and of the soak; ``python -m tests.cluster.fault_matrix`` and ``make soak`` run all."""

import argparse
import random

import pytest

from tests.cluster.fault_matrix import FAULTS, POINTS, all_cells, is_good, run_cells
from tests.cluster.soak import soak

NUM_CELLS = 4


def test_the_matrix_is_complete():
    cells = all_cells()
    assert len(cells) == len(set(cells)) == 48
    assert {(role, fault) for role, _, fault in cells} == {(r, f) for r in ("prefill", "decode") for f in FAULTS}
    assert all(sum(own == role for own, _ in POINTS) == 8 for role in ("prefill", "decode"))


@pytest.mark.parametrize("transport, seed", [("tcp", 0), pytest.param("shared_memory", 1, marks=pytest.mark.slow)])
def test_a_slice_of_the_fault_matrix(transport, seed):
    cells = random.Random(seed).sample(all_cells(), NUM_CELLS)
    results = list(run_cells(cells, transport=transport))
    assert not [result for result in results if not is_good(result)]


def test_a_short_soak():
    options = argparse.Namespace(
        requests=200, distinct=30, concurrency=12, fault_every_s=1.0, prefill=2, decode=2, policy="splitwise",
        transport="tcp", seed=5,
    )  # fmt: skip
    result = soak(options)
    counts = result["counts"]
    assert not result["wrong"] and not result["left"] and not counts.get("hang")
    assert counts["exact"] >= 0.99 * (sum(counts.values()) - counts["left"])
