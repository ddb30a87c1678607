"""One simulated machine: the queue and the steps of one worker, as ``longctx/engine/scheduler.py`` makes them.

A step that only decodes is followed by others alike until a sequence ends or a prompt comes: all of these are one
event, so that a simulation costs events by the number of requests, not of tokens. Pages are counted as tokens, and a
sequence takes those of its whole output when it starts: preemption is not simulated.
"""

from collections.abc import Callable
from dataclasses import dataclass

import simpy

from cluster.fleet.trace import TracedRequest
from cluster.peer import PREFILL_WINDOW
from cluster.policies.policy import WorkerLoad, count_pending
from longctx.machine_profile import MachineProfile


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way."""

    request: TracedRequest
    first_token_s: float = 0.0
    end_s: float = 0.0
    num_missing: int = 0  # prompt tokens to be computed
    num_left: int = 0  # tokens to be generated
    transfers: bool = False  # its prompt is one that prefill machines are for
    start_s: float = 0.0  # when its prompt was begun


class Machine:
    """A worker.

    Args:
        env: the simulation's clock.
        name: unique.
        role: ``"prefill"`` or ``"decode"``.
        profile: how fast it is.
        on_prompt: called with a job whose prompt is computed here for another machine.
        on_token: called with a job that has its first token.
        on_end: called with a job that has its last token.
    """

    def __init__(
        self,
        env: simpy.Environment,
        name: str,
        role: str,
        profile: MachineProfile,
        *,
        on_prompt: Callable[[Job], None],
        on_token: Callable[[Job], None],
        on_end: Callable[[Job], None],
    ) -> None:
        self.env, self.name, self.role, self.profile = env, name, role, profile
        self._on_prompt, self._on_token, self._on_end = on_prompt, on_token, on_end
        self.prompts: list[tuple[Job, bool]] = []  # in order of arrival, and whether they are decoded here
        self.running: list[Job] = []
        self.num_held = 0  # tokens that pages are taken for
        self.num_prompts = self.num_requests = 0  # as in WorkerLoad
        self.busy_s = self.mixed_s = 0.0
        self._context = 0  # tokens of the running jobs
        self._run = 0  # number of the run of steps in progress
        self._begun_s = self._step_s = 0.0  # of that run
        self._chunks: list[tuple[Job, bool, int]] | None = None  # of its step; None: idle
        self._steps = 0
        self._load: WorkerLoad | None = None

    # For the router

    def load(self, num_tokens: int) -> WorkerLoad:
        """As the router's ``WorkerPeer.load``."""
        if self._load is not None and not self.prompts:
            return self._load
        load = WorkerLoad(
            self.name,
            self.name,
            count_pending((job.num_missing for job, _ in self.prompts), num_tokens),
            self.num_requests,
            num_free_pages=self.profile.kv_tokens - self.num_held,
            role=self.role,
            num_prompts=self.num_prompts,
            max_pending_tokens=PREFILL_WINDOW * self.profile.max_batch_tokens,
        )
        self._load = None if self.prompts else load
        return load

    def reserve(self, job: Job) -> bool:
        """Take the pages of a job that is to be decoded here; false if there is no room."""
        num_tokens = job.request.num_prompt_tokens + job.request.num_output_tokens
        if self.num_requests and (
            self.num_held + num_tokens > self.profile.kv_tokens or self.num_requests >= self.profile.max_sequences
        ):
            return False
        self.num_held += num_tokens
        self.num_requests += 1
        self._load = None
        return True

    def compute(self, job: Job, *, is_local: bool) -> None:
        """Queue its prompt."""
        job.num_missing = job.request.num_prompt_tokens
        self.prompts.append((job, is_local))
        self.num_prompts += job.transfers
        if not is_local:
            self.num_held += job.request.num_prompt_tokens
        self._wake()

    def export_done(self, job: Job) -> None:
        """Its KV is where it is needed."""
        self.num_prompts -= job.transfers
        self.num_held -= job.request.num_prompt_tokens
        self._load = None

    def decode(self, job: Job) -> None:
        """Its prompt's KV is here, and its first token with it."""
        self._begin(job)
        self._wake()

    # Steps

    def _begin(self, job: Job) -> None:
        job.num_left = job.request.num_output_tokens - 1
        self._on_token(job)
        if job.num_left:
            self.running.append(job)
            self._context += job.request.num_prompt_tokens + 1
        else:
            self._leave(job)

    def _leave(self, job: Job) -> None:
        self.num_held -= job.request.num_prompt_tokens + job.request.num_output_tokens
        self.num_requests -= 1
        self._load = None
        self._on_end(job)

    def _wake(self) -> None:
        """Work has come: a run of steps that only decode ends with the step that is being computed."""
        self._load = None
        if self._chunks is None:
            self._start()
        elif not self._chunks and self._steps > 1:
            done = int((self.env.now - self._begun_s) / self._step_s)
            if done + 1 < self._steps:
                self._steps = done + 1
                self._schedule(self._begun_s + self._steps * self._step_s - self.env.now)

    def _start(self) -> None:
        if not self.prompts and not self.running:
            self._chunks = None
            return
        profile, num_running = self.profile, len(self.running)
        self._chunks = self._choose_chunks()
        num_tokens = sum(count for _, _, count in self._chunks)
        self._steps = 1 if self._chunks else min(job.num_left for job in self.running)
        context = self._context + num_running * self._steps // 2
        step_s = profile.mixed_time(num_tokens, num_running, context)
        for job, _, count in self._chunks:
            before = job.request.num_prompt_tokens - job.num_missing
            step_s += profile.prompt_context_s * count * before / 1000
        self._begun_s, self._step_s = self.env.now, step_s
        self._schedule(self._steps * step_s)

    def _choose_chunks(self) -> list[tuple[Job, bool, int]]:
        """As the engine's scheduler: in order of arrival, half of a step for those much shorter than the first."""
        if not self.prompts:
            return []
        profile = self.profile
        budget = profile.max_batch_tokens - len(self.running)
        if self.running:
            budget = min(budget, int(profile.max_batch_tokens * profile.mixed_share))
        first = self.prompts[0][0].num_missing
        short = sorted(
            (each for each in self.prompts if 2 * each[0].num_missing < first), key=lambda each: each[0].num_missing
        )
        chunks, taken = [], set()
        for queue, limit in ((short, budget // 2), (self.prompts, budget)):
            for job, is_local in queue:
                left = limit - sum(count for _, _, count in chunks)
                if left <= 0:
                    break
                if id(job) not in taken:
                    taken.add(id(job))
                    chunks.append((job, is_local, min(left, job.num_missing)))
        return chunks

    def _schedule(self, delay_s: float) -> None:
        self._run += 1
        run = self._run
        self.env.timeout(max(0.0, delay_s)).callbacks.append(lambda _: self._finish(run))

    def _finish(self, run: int) -> None:
        if run != self._run:  # cut short
            return
        chunks, steps = self._chunks or [], self._steps
        elapsed = self.env.now - self._begun_s
        self.busy_s += elapsed
        self.mixed_s += elapsed if (self.num_prompts if self.role == "decode" else self.num_requests) else 0.0
        self._load = None
        self._advance(steps)
        for job, is_local, count in chunks:
            job.num_missing -= count
            if job.num_missing:
                continue
            self.prompts.remove((job, is_local))
            if is_local:
                self.num_prompts -= job.transfers
                self._begin(job)
            else:
                self._on_prompt(job)
        self._start()

    def _advance(self, steps: int) -> None:
        self._context += steps * len(self.running)
        ended = []
        for job in self.running:
            job.num_left -= steps
            if not job.num_left:
                ended.append(job)
        if ended:
            self.running = [job for job in self.running if job.num_left]
            for job in ended:
                self._context -= job.request.num_prompt_tokens + job.request.num_output_tokens
                self._leave(job)
