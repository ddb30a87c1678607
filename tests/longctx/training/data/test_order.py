"""Every epoch reads every row once, in an order as good as any other."""

from collections import Counter
from itertools import pairwise

import pytest

from longctx.training.data.order import RowOrder


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 64, 65, 1000])
def test_an_order_is_a_permutation_of_each_epoch(num_rows: int) -> None:
    order = RowOrder(num_rows=num_rows, shuffle=True, seed=7)
    for epoch in range(3):
        read = [order.row_idx(epoch * num_rows + position) for position in range(num_rows)]
        assert sorted(read) == list(range(num_rows))


def test_orders_are_evenly_random() -> None:
    """All 6 orders of 3 rows come up as often, over seeds and over epochs; neighbours of many rows are far apart."""
    for orders in (
        [tuple(RowOrder(3, True, seed).row_idx(n) for n in range(3)) for seed in range(3000)],
        [tuple(RowOrder(3, True, 0).row_idx(3 * epoch + n) for n in range(3)) for epoch in range(3000)],
    ):
        assert all(abs(count - 500) < 100 for count in Counter(orders).values()) and len(set(orders)) == 6
    order = RowOrder(100_000, True, 0)
    rows = [order.row_idx(n) for n in range(2000)]
    distance = sum(abs(a - b) for a, b in pairwise(rows)) / len(rows)
    assert distance == pytest.approx(100_000 / 3, rel=0.1)
