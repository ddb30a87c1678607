"""Goes through tasks and lengths: makes prompts, asks the target, keeps what comes back."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tqdm import tqdm

from longctx.errors import ConfigError
from longctx.evaluation.case import Case, Cell, Material, Task, TextTask
from longctx.evaluation.config import EvalConfig
from longctx.evaluation.fitting import TooShortError
from longctx.evaluation.record import make_record, make_text_record
from longctx.evaluation.store import ResultStore
from longctx.evaluation.target import Answer, Question, Target
from longctx.evaluation.tasks import TASKS
from longctx.evaluation.tasks.perplexity import fill_buckets

logger = logging.getLogger(__name__)

WAVE_TOKENS = 1 << 19  # of prompts that are made, and handed to the target, at one time
PROGRESS_INTERVAL_S = 0.2


def list_cells(config: EvalConfig, name: str, length: int) -> list[Cell]:
    """All prompts of one task at one length, depth by depth."""
    depths = config.depths if TASKS.get(name).has_depth else [None]
    indices = range(config.first_prompt, config.first_prompt + config.num_prompts)
    pairs = [(depth, index) for depth in depths for index in indices]
    if config.share_text:  # those of one text one after the other
        pairs = [(depth, index) for index in indices for depth in depths]
    return [Cell(name, length, depth, index, config.seed) for depth, index in pairs]


def is_text_task(name: str) -> bool:
    """Whether a task scores given text: offline only."""
    return isinstance(TASKS.get(name), TextTask)


def check_shortest(config: EvalConfig, material: Material) -> None:
    """Raise ``ConfigError`` for a task whose question alone is longer than the shortest length."""
    length = min(config.lengths)
    for name in config.tasks:
        if not is_text_task(name):
            _make(TASKS.get(name), list_cells(config, name, length)[0], material)
        elif length < 2:
            raise ConfigError(f"eval.lengths holds {length}, too short for {name}: at least 2 tokens")


class Evaluation:
    """One run.

    Args:
        config: what to measure.
        target: which model.
        store: what is there already, and where results go.
        material: for tasks that ask.
        text: for tasks that score text; None if there are none.
        should_stop: asked between prompts and between steps of long ones; if True, ``run`` raises
            ``KeyboardInterrupt``, with everything in order.
    """

    def __init__(
        self,
        config: EvalConfig,
        target: Target,
        store: ResultStore,
        *,
        material: Material,
        text: Material | None,
        should_stop: Callable[[], bool],
    ) -> None:
        self._config, self._target, self._store = config, target, store
        self._material, self._text, self._should_stop = material, text, should_stop
        self._bar: tqdm | None = None
        self._shown = 0.0

    @property
    def num_prompts(self) -> int:
        """Of the whole run."""
        return sum(len(list_cells(self._config, *pair)) for pair in self._pairs())

    def run(self) -> None:
        """Measure what is not in the store yet, short prompts first."""
        for name, length in self._pairs():
            cells = list_cells(self._config, name, length)
            todo = [cell for cell in cells if (name, length, cell.depth, cell.index) not in self._store.records]
            if not todo:
                continue
            started = time.monotonic()
            with tqdm(total=len(cells), initial=len(cells) - len(todo), unit="prompt", disable=None) as self._bar:
                self._bar.set_description(f"{name}, {length} tokens")
                is_shown = not self._bar.disable
                for wave in _split(todo, max(1, WAVE_TOKENS // length)):
                    (self._score if is_text_task(name) else self._ask)(wave)
            if not is_shown:  # no terminal: a line for each
                logger.info("%s, %d tokens: %d prompts, %.1f s", name, length, len(todo), time.monotonic() - started)

    def _pairs(self) -> list[tuple[str, int]]:
        return [(name, length) for length in sorted(self._config.lengths) for name in self._config.tasks]

    def _ask(self, cells: Sequence[Cell]) -> None:
        made = [self._make_question(cell) for cell in cells]

        def keep(index: int, answer: Answer) -> None:
            case, question = made[index]
            self._store.add(make_record(cells[index], case, answer, question.max_tokens))
            self._advance()

        self._target.ask([question for _, question in made], keep, self._report)

    def _score(self, cells: Sequence[Cell]) -> None:
        assert self._text is not None
        for cell in cells:
            text = TASKS.get(cell.task).make(cell, self._text).text
            logprobs, num_bytes = self._target.score(text, cell.length, self._report)
            self._store.add(make_text_record(cell, text, fill_buckets(logprobs), num_bytes))
            self._advance()

    def _make_question(self, cell: Cell) -> tuple[Case, Question]:
        """The case, made smaller where the context would leave its answer no room."""
        self._heed_stop()
        task, limit = TASKS.get(cell.task), self._target.max_context
        case = _make(task, cell, self._material)
        max_tokens = self._target.count(case.lead + case.ending) + self._config.extra_tokens
        if limit is not None and cell.length + max_tokens > limit:
            room = f" (a prompt may have {limit - max_tokens}: the context is {limit}, the answer takes {max_tokens})"
            case = _make(task, cell, replace(self._material, max_prompt=limit - max_tokens), room)
        return case, Question(case.prompt, case.lead, max_tokens)

    def _advance(self) -> None:
        assert self._bar is not None
        self._bar.set_postfix_str("", refresh=False)
        self._bar.update()

    def _report(self, num_computed: int, num_tokens: int) -> None:
        """How far the prompt is whose answer is next; cheap between two refreshes."""
        self._heed_stop()
        now = time.monotonic()
        if self._bar is not None and now - self._shown > PROGRESS_INTERVAL_S:
            self._shown = now
            is_computed = num_computed >= num_tokens
            self._bar.set_postfix_str("answering" if is_computed else f"prompt: {num_computed}/{num_tokens}")

    def _heed_stop(self) -> None:
        if self._should_stop():
            raise KeyboardInterrupt


def _make(task: Task, cell: Cell, material: Material, room: str = "") -> Case:
    try:
        return task.make(cell, material)
    except TooShortError as error:
        raise ConfigError(f"eval.lengths holds {cell.length}, too short for {cell.task}: {error}{room}") from None


def _split(cells: Sequence[Cell], size: int) -> Iterator[Sequence[Cell]]:
    for start in range(0, len(cells), size):
        yield cells[start : start + size]
