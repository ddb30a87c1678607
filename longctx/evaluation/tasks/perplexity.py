"""Perplexity of running text by position: does a token gain from what stands far before it?

Positions are put together in buckets that double in size. Nothing is asked, so there is no answer to judge; the model's
log probabilities of the text are. Real text only, whatever the haystack of the other tasks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from longctx.evaluation.case import Cell, Material, TextTask, Window
from longctx.evaluation.haystack import TextHaystack

FIRST_BUCKET = 512  # tokens
MAX_NLL = 700.0  # nats, which exp still takes
MAX_CHARS_PER_TOKEN = 12  # of running text, with room


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tokens at positions ``start`` to ``stop``; the last bucket of a text need not be full."""

    start: int
    stop: int
    num_tokens: int  # that the text has there
    nll: float  # negative log likelihood of all of them, nats


def make_window(cell: Cell, material: Material) -> Window:
    """Text from a random line on, more than the cell's tokens."""
    haystack = material.haystack
    assert isinstance(haystack, TextHaystack)
    num_chars = int(cell.length * min(MAX_CHARS_PER_TOKEN, 1.5 * material.chars_per_token)) + 64
    return Window(haystack.open(cell.rng("haystack"), num_chars)(num_chars))


def fill_buckets(logprobs: Sequence[float]) -> list[Bucket]:
    """Sums over 0-512, 512-1,024, 1,024-2,048, ...

    Args:
        logprobs: natural-log probability of the tokens at positions 1, 2, ...; the first has none.
    """
    buckets, start, stop = [], 0, FIRST_BUCKET
    while start <= len(logprobs):
        own = logprobs[max(start - 1, 0) : stop - 1]
        if own:
            buckets.append(Bucket(start, stop, len(own), -math.fsum(own)))
        start, stop = stop, 2 * stop
    return buckets


def name_bucket(bucket: Bucket) -> str:
    """``512-1K``."""
    return f"{_name_position(bucket.start)}-{_name_position(bucket.stop)}"


def measure_perplexity(buckets: Sequence[Bucket]) -> float:
    """exp of the mean negative log likelihood."""
    mean = math.fsum(bucket.nll for bucket in buckets) / sum(bucket.num_tokens for bucket in buckets)
    return math.exp(min(mean, MAX_NLL))


def _name_position(position: int) -> str:
    return f"{position // 1024}K" if position and position % 1024 == 0 else str(position)


TASK = TextTask(make_window)
