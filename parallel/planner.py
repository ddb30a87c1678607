"""Picks the exchange plan that a link model says is fastest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from parallel.links import LinkModel
from parallel.plan import Plan, Problem
from parallel.plans import PLANS
from parallel.prediction import Prediction, predict

SLACK = 0.02  # a plan slower by less than this share counts as equally fast: the model is no more exact than that


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


def rank_plans(problem: Problem, links: LinkModel, *, backward: bool, may_keep: bool = True) -> list[Candidate]:
    """Every plan that can do the problem, the fastest first; of equals the one with fewer bytes."""
    candidates = []
    for name in PLANS:
        try:
            plan = replace(PLANS.get(name)(problem), may_keep=may_keep)
        except ValueError:  # this one cannot do it
            continue
        back = predict(plan, links, backward=True) if backward else None
        candidates.append(Candidate(plan, predict(plan, links), back))
    return sorted(candidates, key=lambda candidate: (candidate.seconds, candidate.num_bytes))


def pick(candidates: Sequence[Candidate]) -> Candidate:
    """What ``auto`` runs, of candidates in the order of their time: the fewest bytes among the fastest."""
    limit = candidates[0].seconds * (1 + SLACK)
    return min((each for each in candidates if each.seconds <= limit), key=lambda each: each.num_bytes)


def plan_anew(name: str, problem: Problem, links: LinkModel, *, backward: bool = False, may_keep: bool = True) -> Plan:
    """The plan ``name``, or for ``auto`` the one to run. Raises ``ValueError`` if it is unknown or cannot do it."""
    if name == "auto":
        return pick(rank_plans(problem, links, backward=backward, may_keep=may_keep)).plan
    return replace(PLANS.get(name)(problem), may_keep=may_keep)


make_plan = lru_cache(maxsize=256)(plan_anew)  # for problems that come again
