"""``longctx bench``: measures one engine of this machine and writes the profile that ``longctx plan cluster`` reads."""

import dataclasses
import logging
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.cli.bench_config import BenchCommandConfig
from longctx.cli.plan_text import align
from longctx.errors import ConfigError
from longctx.machine_profile import MachineProfile, save_profile
from longctx.messages import GenerationRequest, SamplingParams
from longctx.models.checkpoint import inspect_checkpoint
from parallel.option import parse_size

if TYPE_CHECKING:
    from longctx.engine.engine import Engine

logger = logging.getLogger(__name__)

SHORT = 16  # tokens of a prompt that only serves to decode behind it
NUM_STEPS = 16  # decode steps of one measurement
DEPTH = 8  # steps of a prompt, of which the last says what a longer context costs
FEW_TOKENS = 32  # of the smallest step that is measured


def bench(config: BenchCommandConfig) -> int:
    """Measure, print and write; returns 0. Raises ``CheckpointError`` or ``ConfigError``."""
    path = Path(config.bench.file)
    if path.suffix != ".json" or not path.absolute().parent.is_dir():
        raise ConfigError(f"bench.file={path} is not allowed: a file NAME.json in a folder that exists")
    spec = inspect_checkpoint(config.model.path)
    from longctx.engine.build import build_engine  # torch, after what can be refused without it

    engine_config = dataclasses.replace(config.engine, prefix_cache=False)
    engine = build_engine(config.model, engine_config, attention=config.attention)
    try:
        profile = _Bench(engine, config).measure(config.bench.name or f"{spec.name}-{platform.node()}")
    finally:
        engine.close()
    save_profile(profile, path)
    rows = [("prompt tokens", "ms"), *((str(count), f"{1000 * each:.2f}") for count, each in profile.prompt_times)]
    rows += [("sequences", "ms a step"), *((str(count), f"{1000 * each:.2f}") for count, each in profile.token_times)]
    sys.stdout.write("\n".join([*align(rows), f"profile: {path}"]) + "\n")
    return 0


class _Bench:
    def __init__(self, engine: "Engine", config: BenchCommandConfig) -> None:
        self._engine, self._config = engine, config
        self._rng = random.Random(0)
        self._num_requests = 0

    def measure(self, name: str) -> MachineProfile:
        engine, options, limits = self._engine, self._config.bench, self._config.engine
        most = min(limits.max_batch_tokens, engine.max_context - 2)
        self._time_prompt(most)  # warms up
        prompt_times = [(count, self._median(self._time_prompt, count)) for count in _double(FEW_TOKENS, most)]
        sequences = min(options.max_sequences, limits.max_sequences)
        token_times = [(count, self._median(self._time_tokens, count, SHORT)) for count in _double(1, sequences)]
        length = min(DEPTH * most, engine.max_context - NUM_STEPS - 2)
        longer, alone = self._median(self._time_tokens, 1, length), token_times[0][1]
        layout = engine.pool.layout
        return MachineProfile(
            name,
            tuple(prompt_times),
            tuple(token_times),
            kv_tokens=engine.pool.num_pages * layout.page_size,
            prompt_context_s=self._measure_depth(most, length, prompt_times[-1][1]),
            token_context_s=max(0.0, longer - alone) * 1000 / length,
            overhead_s=options.overhead_ms / 1000,
            kv_bytes_per_token=layout.page_bytes // layout.page_size,
            num_layers=layout.num_layers,
            network_bytes_s=float(parse_size(options.network_bytes_s)),
            max_batch_tokens=limits.max_batch_tokens,
            max_sequences=limits.max_sequences,
            mixed_share=limits.mixed_share,
            watts=options.watts,
            cost_per_hour=options.cost_per_hour,
            source=f"longctx bench, {platform.processor() or platform.machine()}, medians of {options.num_rounds}",
        )

    def _measure_depth(self, step: int, length: int, first_s: float) -> float:
        """Seconds for each token of a step and each 1,000 tokens of the same prompt before it."""
        if length < 2 * step:
            return 0.0
        added = max(0.0, self._median(self._time_prompt, length) - first_s * length / step)
        between = length * length / 2 - (length / step) * step * step / 2  # pairs of tokens of different steps
        return added * 1000 / between

    def _median(self, measure: Callable[..., float], *args: int) -> float:
        return statistics.median(measure(*args) for _ in range(self._config.bench.num_rounds))

    def _time_prompt(self, num_tokens: int) -> float:
        self._add(num_tokens, 1)
        begun = time.perf_counter()
        self._drain()
        return time.perf_counter() - begun

    def _time_tokens(self, num_sequences: int, num_tokens: int) -> float:
        """One decode step, of several."""
        for _ in range(num_sequences):
            self._add(num_tokens, NUM_STEPS + 2)
        while self._engine.stats().pending_prefill_tokens:
            self._engine.step()
        begun = time.perf_counter()
        for _ in range(NUM_STEPS):
            self._engine.step()
        taken = time.perf_counter() - begun
        self._drain()
        return taken / NUM_STEPS

    def _add(self, num_tokens: int, num_outputs: int) -> None:
        self._num_requests += 1
        limit = self._engine.decoder.spec.vocab_size // 2
        prompt = tuple(self._rng.randrange(limit) for _ in range(num_tokens))
        params = SamplingParams(temperature=0.0, max_tokens=num_outputs, ignore_eos=True)
        self._engine.add(GenerationRequest(f"bench-{self._num_requests}", prompt, params))

    def _drain(self) -> None:
        while self._engine.has_work:
            self._engine.step()


def _double(first: int, last: int) -> list[int]:
    counts = [first]
    while 2 * counts[-1] < last:
        counts.append(2 * counts[-1])
    return [*counts, last] if last > counts[-1] else counts
