"""The scheduler as a state machine: in whatever order things come, no page is lost or leaked, and all end."""

from types import SimpleNamespace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.longctx.test_scheduler import PAGE_SIZE, check, enqueue, make_scheduler, step

NUM_PAGES = 24
MOST_OUTPUTS = 12  # of one sequence, which then ends


class SchedulerStates(RuleBasedStateMachine):
    """Prompts come, some alike, some for others; steps are computed; clients leave; prompts arrive from elsewhere."""

    @initialize(prefix_cache=st.booleans(), share=st.sampled_from((0.25, 1.0)), batch=st.sampled_from((4, 16, 64)))
    def make(self, prefix_cache, share, batch):
        self.scheduler = make_scheduler(
            NUM_PAGES, max_batch_tokens=batch, max_sequences=4, prefix_cache=prefix_cache, mixed_share=share
        )
        self.alive, self.reserved, self.arrival = [], [], 0

    @rule(length=st.integers(1, 40), alike=st.booleans())
    def add(self, length, alike):
        self.arrival += 1
        self.alive.append(enqueue(self.scheduler, self.arrival, length, first_token=0 if alike else None))

    @rule(length=st.integers(1, 30))
    def add_export(self, length):
        self.arrival += 1
        self.alive.append(enqueue(self.scheduler, self.arrival, length, export=SimpleNamespace()))

    @rule(length=st.integers(1, 40))
    def reserve(self, length):
        """As ``Engine.reserve``."""
        scheduler = self.scheduler
        self.arrival += 1
        sequence = enqueue(scheduler, self.arrival, length)
        scheduler.waiting.remove(sequence)
        if scheduler.is_blocked or not scheduler.has_rows(1) or scheduler.reserve(sequence) is None:
            return
        scheduler.num_reserved_rows += 1
        self.reserved.append(sequence)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), arrives=st.booleans())
    def settle(self, data, arrives):
        """A reserved prompt arrives, or is given up."""
        sequence = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        self.scheduler.num_reserved_rows -= 1
        if arrives:
            self.scheduler.take_over(sequence)
            sequence.active.is_forked = True
            sequence.outputs.append(7)
            self.scheduler.rows.add(sequence)
            self.alive.append(sequence)
        else:
            self.scheduler.drop(sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def leave(self, data):
        self.scheduler.drop(self.alive.pop(data.draw(st.integers(0, len(self.alive) - 1))))

    @rule(count=st.integers(1, 5))
    def compute(self, count):
        for _ in range(count):
            self._step()

    def _step(self):
        scheduler = self.scheduler
        if scheduler.is_blocked and self.reserved:  # as Engine._give_exports_back
            for sequence in [each for each in scheduler.waiting if each.active.export is not None]:
                scheduler.drop(sequence)
                self.alive.remove(sequence)
        chunks = step(scheduler, holders=self.reserved)
        assert sum(stop - start for _, start, stop in chunks) <= max(scheduler._max_batch_tokens, PAGE_SIZE), (
            "a step is bounded"
        )
        for sequence in list(self.alive):
            is_sent = sequence.active.export is not None and sequence.row >= 0  # its first token is there
            if is_sent or len(sequence.outputs) >= MOST_OUTPUTS or sequence.num_tokens >= 80:
                scheduler.drop(sequence)
                self.alive.remove(sequence)

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "scheduler"):
            check(self.scheduler, holders=self.reserved)
            places = [*self.scheduler.waiting, *self.scheduler.prefilling, *self.scheduler.rows.sequences]
            assert sorted(map(id, places)) == sorted(map(id, self.alive))

    def teardown(self):
        """Everybody who stays is served to the end, in bounded time; then all pages are free."""
        if not hasattr(self, "scheduler"):
            return
        while self.reserved:
            self.scheduler.num_reserved_rows -= 1
            self.scheduler.drop(self.reserved.pop())
        for _ in range(2000):
            if not self.alive:
                break
            self._step()
        assert not self.alive, "somebody starves"
        assert self.scheduler.cache.num_used == 0


SchedulerStates.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSchedulerStates = SchedulerStates.TestCase
