"""Whether ranks fit a cluster, and what is said if not."""

import pytest

from cluster.room import Bundle, find_shortage

TWO_AND_FOUR = [{"CPU": 2.0}, {"CPU": 4.0, "GPU": 2.0}]


@pytest.mark.parametrize(
    ("num_ranks", "cpus", "gpus", "strategy", "words"),
    [
        (6, 1, 0, "PACK", []),
        (7, 1, 0, "PACK", ["2 nodes have 6 CPUs and 2 GPUs", "room for 6", "cluster.cpus_per_rank=0.8 would fit"]),
        (3, 1.5, 0, "SPREAD", []),  # one and two: halves of both are left
        (4, 1.5, 0, "SPREAD", ["1.5 CPUs and 0 GPUs each", "room for 3"]),
        (2, 1, 1, "PACK", []),
        (3, 1, 1, "PACK", ["1 CPUs and 1 GPUs each", "room for 2"]),
        (4, 1, 0, "STRICT_PACK", []),
        (5, 1, 0, "STRICT_PACK", ["one has to take all", "the largest has room for 4"]),
        (2, 1, 0, "STRICT_SPREAD", []),
        (3, 1, 0, "STRICT_SPREAD", ["each rank needs one of its own", "2 have room for one"]),
        (20, 0.3, 0, "PACK", ["room for 19"]),  # 6 and 13
        (100, 0, 0, "PACK", []),
    ],
)
def test_shortage(num_ranks, cpus, gpus, strategy, words):
    found = find_shortage(TWO_AND_FOUR, num_ranks, Bundle(cpus, gpus), strategy)
    assert bool(found) == bool(words), found
    for word in words:
        assert word in found


def test_what_is_said_to_fit_fits():
    for num_ranks in range(7, 60):
        found = find_shortage(TWO_AND_FOUR, num_ranks, Bundle(1.0, 0.0), "PACK")
        share = float(found.partition("cluster.cpus_per_rank=")[2].partition(" ")[0])
        assert not find_shortage(TWO_AND_FOUR, num_ranks, Bundle(share, 0.0), "PACK"), num_ranks


def test_an_empty_cluster():
    assert "0 nodes have 0 CPUs" in find_shortage([], 1, Bundle(1.0, 0.0), "STRICT_PACK")
