"""Requests over time: of a file, or drawn to have the shape of Azure's published traces (Splitwise, section III)."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from longctx.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Quantiles (0, 50, 90, 99 and 100 %) of lengths in tokens, and how unevenly requests come."""

    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    arrival_cv: float  # standard deviation of the time between two arrivals, over its mean


QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
SHAPES = {
    "azure_code": Shape((32, 1469, 5186, 7436, 8000), (1, 13, 55, 249, 1000), 13.2),
    "azure_conversation": Shape((32, 1020, 2734, 4142, 8000), (1, 129, 424, 601, 1000), 1.1),
}


def draw_trace(shape: Shape, *, rate: float, duration_s: float, seed: int, steady: bool = False) -> list[TracedRequest]:
    """Requests at ``rate`` a second on average; ``steady``: with the arrivals of independent users (CV 1)."""
    draws = random.Random(seed)
    spread = 1.0 / (1.0 if steady else shape.arrival_cv) ** 2  # a gamma distribution's shape
    arrival_s, requests = 0.0, []
    while True:
        arrival_s += draws.gammavariate(spread, 1.0 / (spread * rate))
        if arrival_s >= duration_s:
            return requests
        prompt, output = (_draw(quantiles, draws.random()) for quantiles in (shape.prompt_tokens, shape.output_tokens))
        requests.append(TracedRequest(arrival_s, prompt, output))


def load_trace(path: Path, *, rate: float | None = None) -> list[TracedRequest]:
    """JSONL with ``arrival_s``, ``num_prompt_tokens`` and ``num_output_tokens``; ``rate`` stretches time to so many
    requests a second. Raises ``ConfigError`` naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"trace.file={path} cannot be read: {error.strerror}") from None
    requests = [_read_request(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise ConfigError(f"trace.file={path} holds no request")
    requests.sort(key=lambda request: request.arrival_s)
    first, last = requests[0].arrival_s, requests[-1].arrival_s
    scale = 1.0 if rate is None or last == first else (len(requests) - 1) / (last - first) / rate
    return [
        TracedRequest((each.arrival_s - first) * scale, each.num_prompt_tokens, each.num_output_tokens)
        for each in requests
    ]


def _read_request(line: str, place: str) -> TracedRequest:
    try:
        row = json.loads(line)
        request = TracedRequest(float(row["arrival_s"]), int(row["num_prompt_tokens"]), int(row["num_output_tokens"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{place}: expected are arrival_s, num_prompt_tokens and num_output_tokens ({error!r})"
        ) from None
    if not 0 <= request.arrival_s < math.inf or request.num_prompt_tokens < 1 or request.num_output_tokens < 1:
        raise ConfigError(f"{place}: arrival_s is to be at least 0, and tokens at least 1")
    return request


def _draw(values: Sequence[int], place: float) -> int:
    """Between two quantiles, evenly on a logarithmic scale."""
    spans = zip(pairwise(QUANTILES), pairwise(values), strict=True)
    (low, high), (first, last) = next(span for span in spans if place <= span[0][1])
    share = (place - low) / (high - low)
    return max(1, round(math.exp(math.log(first) + share * (math.log(last) - math.log(first)))))
