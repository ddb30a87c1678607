"""What one request's clock says, and the numbers made of it. No third-party imports: GPU machines may lack them.

All times are seconds of ``time.perf_counter``, which on Linux is one clock for every process of a machine.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.checkpoints import Shape


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """When one request was sent and when its output arrived."""

    sent_s: float
    event_s: tuple[float, ...]  # arrivals of output; an event may hold several tokens
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Seconds to the first output."""
        return self.event_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean seconds per output token after the first."""
        return (self.event_s[-1] - self.event_s[0]) / (self.num_output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between neighbouring arrivals."""
        return [later - earlier for earlier, later in zip(self.event_s, self.event_s[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine was measured to do at most."""

    matmul_flops_per_s: float  # bf16
    read_bytes_per_s: float


def check_timing(timing: RequestTiming, num_output_tokens: int) -> None:
    """Raises ``RuntimeError`` unless the request produced exactly what was asked for."""
    if timing.num_output_tokens != num_output_tokens:
        raise RuntimeError(f"asked for {num_output_tokens} output tokens, got {timing.num_output_tokens}")
    if len(timing.event_s) < 2:
        raise RuntimeError(f"{num_output_tokens} output tokens came in {len(timing.event_s)} event: nothing to time")


def measure_wave(timings: Sequence[RequestTiming]) -> dict[str, float]:
    """The numbers of requests sent together.

    Returns:
        ``ttft_s``: median over requests. ``prefill_tokens_per_s``: all prompt tokens over the time to the last first
        token. ``tpot_ms``: median over requests of the mean time per token after the first, stalls by other requests'
        prefill included. ``itl_ms``: median gap between arrivals of all requests, which leaves rare stalls out.
        ``requests_per_s`` and ``output_tokens_per_s``: over the time from the first sending to the last token.
    """
    start = min(timing.sent_s for timing in timings)
    prefilled = max(timing.event_s[0] for timing in timings)
    end = max(timing.event_s[-1] for timing in timings)
    return {
        "ttft_s": statistics.median(timing.ttft_s for timing in timings),
        "prefill_tokens_per_s": sum(timing.num_prompt_tokens for timing in timings) / (prefilled - start),
        "tpot_ms": 1e3 * statistics.median(timing.tpot_s for timing in timings),
        "itl_ms": 1e3 * statistics.median(gap for timing in timings for gap in timing.gaps_s),
        "events_per_token": statistics.mean(len(timing.event_s) / timing.num_output_tokens for timing in timings),
        "requests_per_s": len(timings) / (end - start),
        "output_tokens_per_s": sum(timing.num_output_tokens for timing in timings) / (end - start),
    }


def summarise(rounds: Sequence[dict[str, float]], shape: Shape, limits: Limits, **cell: int) -> dict[str, Any]:
    """Medians over rounds, their spread, and the share of the machine's limits they reach.

    Args:
        rounds: results of ``measure_wave``.
        shape: the model's.
        limits: the machine's.
        cell: ``num_prompt_tokens``, ``num_output_tokens`` and ``num_streams``.

    Returns:
        Medians under the names of ``measure_wave``; ``spread``: lowest and highest of each;
        ``prefill_share_of_matmul``; ``decode_share_of_bandwidth``: bytes a step must read, by the median gap per token.
    """
    num_prompt, num_streams = cell["num_prompt_tokens"], cell["num_streams"]
    result: dict[str, Any] = {name: statistics.median(wave[name] for wave in rounds) for name in rounds[0]}
    result["spread"] = {name: [min(w[name] for w in rounds), max(w[name] for w in rounds)] for name in rounds[0]}
    flops_per_token = shape.prefill_flops(num_prompt) / num_prompt
    result["prefill_share_of_matmul"] = result["prefill_tokens_per_s"] * flops_per_token / limits.matmul_flops_per_s
    context = num_prompt + cell["num_output_tokens"] // 2  # half-way through the output
    step_s = result["itl_ms"] * result["events_per_token"] / 1e3
    bytes_per_s = shape.decode_bytes(context, num_streams=num_streams) / step_s
    result["decode_share_of_bandwidth"] = bytes_per_s / limits.read_bytes_per_s
    return result
