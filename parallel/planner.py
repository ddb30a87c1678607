"""Picks the exchange plan that a link model says is fastest."""

from dataclasses import dataclass
from functools import lru_cache

from parallel.links import LinkModel
from parallel.plan import Plan, Problem
from parallel.plans import PLANS
from parallel.prediction import Prediction, predict


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan and what it is expected to cost."""

    plan: Plan
    forward: Prediction
    backward: Prediction | None

    @property
    def seconds(self) -> float:
        """Of the forward, and of the backward where there is one."""
        return self.forward.seconds + (self.backward.seconds if self.backward else 0.0)

    @property
    def num_bytes(self) -> int:
        """Over all links, likewise."""
        return self.forward.num_bytes + (self.backward.num_bytes if self.backward else 0)


def rank_plans(problem: Problem, links: LinkModel, *, backward: bool) -> list[Candidate]:
    """Every plan that can do the problem, the fastest first; of equals the one with fewer bytes."""
    candidates = []
    for name in PLANS:
        try:
            plan = PLANS.get(name)(problem)
        except ValueError:  # this one cannot do it
            continue
        back = predict(plan, links, backward=True) if backward else None
        candidates.append(Candidate(plan, predict(plan, links), back))
    return sorted(candidates, key=lambda candidate: (candidate.seconds, candidate.num_bytes))


@lru_cache(maxsize=256)
def make_plan(name: str, problem: Problem, links: LinkModel, *, backward: bool = False) -> Plan:
    """The plan ``name``, or the fastest one for ``auto``. Raises ``ValueError`` if it is unknown or cannot do it."""
    if name == "auto":
        return rank_plans(problem, links, backward=backward)[0].plan
    return PLANS.get(name)(problem)
