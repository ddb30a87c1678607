"""As many requests at a time as keep their targets: a limit that follows the TTFT and TPOT that requests got.

Additive increase, multiplicative decrease (Chiu and Jain, 1989): it grows by one while targets are kept and requests
were refused for want of places, and shrinks with the miss when they are not; a limit under which they were missed is
not tried again for a while. Only requests that came after the last change say anything about it. Until the first miss
it grows by half: a machine that can serve hundreds gets there in seconds.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.config import ServerConfig
from cluster.rate_limit import Places

START = 8  # requests at a time, until the first say how that went
WINDOW_S = 1.0  # between two changes, and longer for want of requests
MIN_SAMPLES = 8  # before a change
COMFORT = 0.9  # of a target: under that there is room for another request
HOLD_S = 30.0  # for which a limit under which targets were missed is not tried again
MAX_SHRINK, MIN_SHRINK = 0.5, 0.9  # what is left of a limit under which targets were missed


@dataclass(slots=True)
class Target:
    """One of the targets, and how requests do against it."""

    seconds: float
    ratios: list[float] = field(default_factory=list)  # of what requests got since the last change

    def find(self, percentile: float) -> float:
        """What so many percent of the requests did not exceed, over the target."""
        return sorted(self.ratios)[math.ceil(percentile / 100 * len(self.ratios)) - 1] if self.ratios else 0.0


class SloLimit:
    """Lowers and raises ``places.limit`` between 1 and ``server.max_requests``; leaves it alone without targets.

    Args:
        server: ``slo_ttft_s``, ``slo_tpot_s``, ``slo_percentile``, ``slo_prompt_tokens``.
        places: the server's.
        on_judged: called with "ttft" or "tpot", and whether a request kept that target.
        clock: what requests' arrivals are told by; seconds that only grow.
    """

    def __init__(
        self,
        server: ServerConfig,
        places: Places,
        *,
        on_judged: Callable[[str, bool], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        given = {"ttft": server.slo_ttft_s, "tpot": server.slo_tpot_s}
        self._on_judged = on_judged
        self._targets = {name: Target(seconds) for name, seconds in given.items() if seconds is not None}
        self._server, self._places, self._clock = server, places, clock
        self._limit = float(min(START, server.max_requests))
        self._changed_at = clock()
        self._missed_limit, self._missed_at = math.inf, -math.inf
        if self._targets:
            places.limit = int(self._limit)

    def note_ttft(self, seconds: float, num_prompt_tokens: int, *, started: float) -> None:
        """A request that arrived at ``started`` has its first token."""
        if num_prompt_tokens <= self._server.slo_prompt_tokens:
            self._note("ttft", seconds, started)

    def note_tpot(self, seconds: float, *, started: float) -> None:
        """A sequence has ended that took so long for each token after its first."""
        self._note("tpot", seconds, started)

    def _note(self, name: str, seconds: float, started: float) -> None:
        target = self._targets.get(name)
        if target is None:
            return
        self._on_judged(name, seconds <= target.seconds)
        if started >= self._changed_at:  # others were served among more, or fewer
            target.ratios.append(seconds / target.seconds)
        if self._clock() >= self._changed_at + WINDOW_S:
            self._follow()

    def _follow(self) -> None:
        if max(len(target.ratios) for target in self._targets.values()) < MIN_SAMPLES:
            return
        worst = max(target.find(self._server.slo_percentile) for target in self._targets.values())
        was_full, self._places.was_full = self._places.was_full, False
        if worst > 1:
            self._missed_limit, self._missed_at = self._places.limit, self._clock()
            self._change(self._limit * min(MIN_SHRINK, max(MAX_SHRINK, 1 / worst)))
        elif worst < COMFORT and was_full and self._may_grow():
            self._change(self._limit + (1 if self._missed_limit < math.inf else max(1, self._limit / 2)))
        else:
            for target in self._targets.values():
                del target.ratios[: -4 * MIN_SAMPLES]

    def _may_grow(self) -> bool:
        return self._limit + 1 < self._missed_limit or self._clock() >= self._missed_at + HOLD_S

    def _change(self, limit: float) -> None:
        self._limit = min(float(self._server.max_requests), max(1.0, limit))
        self._places.limit = int(self._limit)
        self._changed_at = self._clock()
        for target in self._targets.values():
            target.ratios.clear()
