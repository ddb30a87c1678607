"""The share of hidden communication, from times that are known and from a plan that runs without one of the two."""

import pytest
import torch

from benchmarks.hidden_communication import DIRECTIONS, MODES, InstantCarrier, InstantKernel, describe_hidden
from parallel.carrier import drive
from parallel.links import LinkModel
from parallel.mask import Mask
from parallel.plan import make_problem
from parallel.planner import make_plan
from parallel.plans import PLANS
from parallel.tile_exchange import Backward, Forward


@pytest.mark.parametrize(("both", "hidden"), [(1.1, 1.0), (1.5, 0.0), (1.3, 0.5), (0.9, 1.0), (1.7, 0.0)], ids=str)
def test_share_is_one_where_the_longer_one_decides(both, hidden):
    """The executor takes 0.1 s, computing 0.4 s more, communication 1.0 s more."""
    times = {"both": both, "compute": 0.5, "communication": 1.1, "executor": 0.1}
    record = {f"{mode}_s": [times[mode]] * 3 for mode in MODES} | {f"{mode}_cpu_s": [0.2] for mode in MODES}
    record["communication_cpu_s"] = [0.7]
    described = describe_hidden([{"plan": "any"} | dict.fromkeys(DIRECTIONS, record)] * 2)
    assert described["hidden"] == described["forward"]["hidden"] == pytest.approx(hidden, abs=1e-3)
    assert described["forward"]["communication_cpu_s"] == pytest.approx(1.0)  # of both ranks


def test_nothing_is_said_of_little_to_hide():
    times = {"both": 2.0, "compute": 0.2, "communication": 2.0, "executor": 0.1}
    record = {f"{mode}_s": [times[mode]] for mode in MODES} | {f"{mode}_cpu_s": [0.2] for mode in MODES}
    assert describe_hidden([{"plan": "any"} | dict.fromkeys(DIRECTIONS, record)])["hidden"] is None


@pytest.mark.parametrize("name", list(PLANS))
def test_every_plan_runs_alone(name):
    """Nothing arrives and nothing is computed, yet every step is gone through; each rank by itself."""
    problem = make_problem(Mask(), 64, 64, (4, 2, 8), world_size=4)
    plan = make_plan(name, problem, LinkModel())
    for rank in range(4):
        q, dout = torch.randn(2, 1, 16, 4, 8)
        k, v = torch.randn(2, 1, 16, 2, 8)
        carrier, kernel = InstantCarrier(rank, 4), InstantKernel()
        forward = Forward(plan, rank, carrier, kernel, q, k, v, 1.0)
        drive(forward.run(), rank, 1.0)
        tensors = q, k, v, dout, forward.lse, (dout * forward.out).sum(-1)
        backward = Backward(plan, rank, carrier, kernel, *tensors, 1.0, forward.kept)
        drive(backward.run(), rank, 1.0)
        for result in (forward.out, backward.dq, backward.dk, backward.dv):
            assert not result.any()
