"""Interleaved rounds: every engine takes every cell of a grid once per round, one engine at a time."""

import itertools
import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.checkpoints import FIRST_WORD_ID
from benchmarks.peers import Engine
from benchmarks.processes import MemorySampler
from benchmarks.timings import measure_wave

logger = logging.getLogger(__name__)

SETTLE_S = 1.5  # vLLM polls for a second after its last work; idle OpenMP threads spin, too


@dataclass(frozen=True, slots=True)
class Cell:
    """One load: ``num_streams`` requests sent together."""

    num_prompt_tokens: int
    num_streams: int
    num_output_tokens: int


@dataclass(slots=True)
class Record:
    """What one engine did in one cell."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    peak_memory_bytes: int = 0
    skipped: str | None = None  # the reason


class Grid:
    """Runs rounds and keeps what was measured.

    Args:
        cells: the loads.
        engines: all running; one that fails is left out from then on.
        vocab_size: prompts are drawn from the words below it.
        seed: of the prompts; every wave has fresh ones, which all engines get.
        timeout_s: for one wave.
    """

    def __init__(
        self, cells: Sequence[Cell], engines: Sequence[Engine], *, vocab_size: int, seed: int, timeout_s: float
    ) -> None:
        self.cells = cells
        self.engines = list(engines)
        self.records = {(cell, engine.name): Record() for cell in cells for engine in engines}
        self.failed: dict[str, str] = {}
        self._vocab_size = vocab_size
        self._seed = seed
        self._timeout_s = timeout_s

    def warm_up(self) -> None:
        """One round that is not timed and in which memory is sampled."""
        for cell, engine in self._turns(0):
            with MemorySampler(engine.tree) as sampler:
                self._run(cell, engine, 0)
            self.records[cell, engine.name].peak_memory_bytes = sampler.peak_bytes

    def run_round(self, round_idx: int) -> None:
        """One timed round; ``round_idx`` counts from 1 and turns the order of the engines."""
        for cell, engine in self._turns(round_idx):
            wave = self._run(cell, engine, round_idx)
            if wave is not None:
                self.records[cell, engine.name].rounds.append(wave)

    def _turns(self, round_idx: int) -> Iterator[tuple[Cell, Engine]]:
        first = round_idx % max(1, len(self.engines))
        order = [*self.engines[first:], *self.engines[:first]]
        for cell, engine in itertools.product(self.cells, order):
            record = self.records[cell, engine.name]
            num_tokens = cell.num_prompt_tokens * cell.num_streams
            if engine.name in self.failed:
                record.skipped = f"failed before: {self.failed[engine.name]}"
            elif engine.max_wave_tokens is not None and num_tokens > engine.max_wave_tokens:
                record.skipped = f"takes at most {engine.max_wave_tokens} prompt tokens at one time"
            else:
                yield cell, engine

    def _run(self, cell: Cell, engine: Engine, round_idx: int) -> dict[str, float] | None:
        """The wave's numbers, or None when the engine failed."""
        prompts = draw_prompts(f"{self._seed} {round_idx} {cell}", cell, self._vocab_size)
        time.sleep(SETTLE_S)
        try:
            timings = engine.run_wave(prompts, num_output_tokens=cell.num_output_tokens, timeout_s=self._timeout_s)
        except (RuntimeError, TimeoutError) as error:
            logger.error("%s failed at %s: %s", engine.name, cell, error)
            self.failed[engine.name] = str(error) or type(error).__name__
            return None
        wave = measure_wave(timings)
        logger.info(
            "round %d  %-18s %5d x %-2d  TTFT %7.3f s  prefill %6.0f tok/s  TPOT %7.1f ms  %6.1f output tok/s",
            round_idx,
            engine.name,
            cell.num_prompt_tokens,
            cell.num_streams,
            wave["ttft_s"],
            wave["prefill_tokens_per_s"],
            wave["tpot_ms"],
            wave["output_tokens_per_s"],
        )
        return wave


def draw_prompts(seed: str, cell: Cell, vocab_size: int) -> list[list[int]]:
    """Random words for every stream of a cell; equal seeds give equal prompts."""
    generator = random.Random(seed)
    words = range(FIRST_WORD_ID, vocab_size)
    return [generator.choices(words, k=cell.num_prompt_tokens) for _ in range(cell.num_streams)]
