"""Percentiles of what requests experienced lately, to compare with targets: a histogram's buckets are too coarse."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable

MAX_SAMPLES = 4096


class LatencyWindow:
    """TTFT and TPOT of the last requests.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ttft: deque[tuple[float, float, int]] = deque(maxlen=MAX_SAMPLES)  # when, seconds, prompt tokens
        self._tpot: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def add_ttft(self, seconds: float, num_prompt_tokens: int) -> None:
        """A request has its first token."""
        self._ttft.append((self._clock(), seconds, num_prompt_tokens))

    def add_tpot(self, seconds: float) -> None:
        """A sequence has ended that took so long for each token after its first."""
        self._tpot.append((self._clock(), seconds))

    def find_ttft(
        self, percentile: float, window_s: float, *, above: int = -1, at_most: float = math.inf
    ) -> float | None:
        """Seconds that so many percent of the window's requests did not exceed; None if there were none.

        Args:
            percentile: in (0, 100].
            window_s: back from now.
            above, at_most: prompt tokens of the requests that count.
        """
        start = self._clock() - window_s
        chosen = (took for when, took, tokens in self._ttft if when >= start and above < tokens <= at_most)
        return _find_percentile(chosen, percentile)

    def find_tpot(self, percentile: float, window_s: float) -> float | None:
        """As ``find_ttft``."""
        start = self._clock() - window_s
        return _find_percentile((took for when, took in self._tpot if when >= start), percentile)


def _find_percentile(values: Iterable[float], percentile: float) -> float | None:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[math.ceil(percentile / 100 * len(ordered)) - 1] if ordered else None
