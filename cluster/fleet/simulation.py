"""The fleet: requests come, the policy places them, machines compute, KV travels. Discrete events (simpy).

The rules are the live router's (``cluster/router.py``): prompts wait first come, first served, long ones apart; a
machine is given a window of prompt tokens; a prompt that is short is computed where it is decoded; KV is sent layer by
layer, so that what is left to send when the prompt is computed is one layer, or whatever the link lags behind.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import simpy

from cluster.fleet.machine import Job, Machine
from cluster.fleet.trace import TracedRequest
from cluster.peer import PREFILL_WINDOW
from cluster.policies import POLICIES
from cluster.policies.policy import Policy, WorkerLoad
from longctx.machine_profile import MachineProfile


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """Which machines there are, and how requests are placed."""

    prefill: tuple[tuple[MachineProfile, int], ...]  # machines started for prompts; none: decode machines compute them
    decode: tuple[tuple[MachineProfile, int], ...]
    policy: str
    local_prefill_tokens: int = 512

    @property
    def machines(self) -> list[tuple[str, MachineProfile]]:
        """Role and profile of each."""
        groups = (("prefill", self.prefill), ("decode", self.decode))
        return [(role, profile) for role, group in groups for profile, count in group for _ in range(count)]


@dataclass(slots=True)
class FleetRun:
    """What happened."""

    plan: FleetPlan
    jobs: list[Job] = field(default_factory=list)  # in order of arrival
    duration_s: float = 0.0  # until the last token
    busy_share: dict[str, float] = field(default_factory=dict)  # of the time, by role
    mixed_share: float = 0.0  # of the busy time with work of the other role


def simulate(plan: FleetPlan, trace: Sequence[TracedRequest], *, patience_s: float | None = None) -> FleetRun:
    """Run the trace through the fleet.

    Args:
        plan: the fleet.
        trace: in order of arrival; not empty.
        patience_s: seconds after the last arrival at which the run is given up: the fleet is overloaded.
    """
    fleet = _Fleet(plan)
    return fleet.run(trace, patience_s)


class _Fleet:
    def __init__(self, plan: FleetPlan) -> None:
        self._plan, self._env = plan, simpy.Environment()
        self._policy: Policy = POLICIES.get(plan.policy)()
        self._computers: dict[int, tuple[Machine, Machine]] = {}  # of a job: who computes, and who decodes it
        self._queues: tuple[deque[Job], deque[Job], deque[Job]] = (deque(), deque(), deque())  # local, short, long
        self._num_ended = 0
        self._link_free_s: dict[str, float] = {}
        self.machines = [
            Machine(
                self._env,
                f"{role}-{number}",
                role,
                profile,
                on_prompt=self._ship,
                on_token=self._note_token,
                on_end=self._note_end,
            )
            for number, (role, profile) in enumerate(plan.machines)
        ]
        self._by_name = {machine.name: machine for machine in self.machines}
        self._has_prefill = bool(plan.prefill)
        self._window = PREFILL_WINDOW * max(profile.max_batch_tokens for _, profile in plan.machines)

    def run(self, trace: Sequence[TracedRequest], patience_s: float | None) -> FleetRun:
        run = FleetRun(self._plan, [Job(request) for request in trace])
        for job in run.jobs:
            self._after(job.request.arrival_s, lambda job=job: self._arrive(job))
        limit = None if patience_s is None else trace[-1].arrival_s + patience_s
        while self._num_ended < len(trace) and self._env.peek() < (limit or float("inf")):
            self._env.step()
        run.duration_s = self._env.now
        for role in ("prefill", "decode"):
            busy = [machine.busy_s for machine in self.machines if machine.role == role]
            run.busy_share[role] = sum(busy) / len(busy) / run.duration_s if busy else 0.0
        busy_s = sum(machine.busy_s for machine in self.machines)
        run.mixed_share = sum(machine.mixed_s for machine in self.machines) / busy_s if busy_s else 0.0
        return run

    def _after(self, delay_s: float, function) -> None:
        self._env.timeout(delay_s).callbacks.append(lambda _: function())

    def _arrive(self, job: Job) -> None:
        num_tokens = job.request.num_prompt_tokens
        transfers = job.transfers = self._has_prefill and num_tokens > self._plan.local_prefill_tokens
        self._queues[transfers + (transfers and num_tokens > self._window)].append(job)
        self._place_waiting()

    def _place_waiting(self) -> None:
        for number, queue in enumerate(self._queues):
            while queue and self._place(queue[0], transfers=number > 0):
                queue.popleft()

    def _place(self, job: Job, *, transfers: bool) -> bool:
        num_tokens, any_role = job.request.num_prompt_tokens, self._policy.repurposes
        prefill = self._loads(num_tokens, "" if any_role else "prefill") if transfers else []
        decode = prefill if transfers and any_role else self._loads(num_tokens, "" if any_role else "decode")
        while decode:
            computer, generator = self._policy.choose(prefill, decode, num_tokens=num_tokens)
            if computer is not None and computer.has_long_queue(num_tokens):
                return False
            target = self._by_name[generator.name]
            if target.reserve(job):
                self._hand_over(job, computer, target)
                return True
            decode = [load for load in decode if load is not generator]
        return False

    def _loads(self, num_tokens: int, role: str) -> list[WorkerLoad]:
        """Of the machines of one role, or all."""
        return [machine.load(num_tokens) for machine in self.machines if not role or machine.role == role]

    def _hand_over(self, job: Job, computer: WorkerLoad | None, target: Machine) -> None:
        source = target if computer is None else self._by_name[computer.name]
        self._computers[id(job)] = (source, target)
        job.start_s = self._env.now
        source.compute(job, is_local=source is target)

    def _ship(self, job: Job) -> None:
        """The prompt is computed: what has not been sent yet travels, behind what else leaves this machine."""
        source, target = self._computers[id(job)]
        now, profile = self._env.now, source.profile
        total_s = job.request.num_prompt_tokens * profile.kv_bytes_per_token / profile.network_bytes_s
        begun_s = max(job.start_s, self._link_free_s.get(source.name, 0.0))
        sent_s = max(now + total_s / profile.num_layers, begun_s + total_s)
        self._link_free_s[source.name] = sent_s

        def arrive() -> None:
            source.export_done(job)
            target.decode(job)
            self._place_waiting()

        self._after(sent_s - now, arrive)

    def _note_token(self, job: Job) -> None:
        _, target = self._computers[id(job)]
        job.first_token_s = self._env.now + target.profile.overhead_s

    def _note_end(self, job: Job) -> None:
        _, target = self._computers.pop(id(job))
        job.end_s = self._env.now + target.profile.overhead_s
        self._num_ended += 1
        self._after(0.0, self._place_waiting)
