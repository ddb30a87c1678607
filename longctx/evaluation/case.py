"""What a task makes: one prompt, and how its answer is judged. No torch here.

A prompt is a pure function of its ``Cell`` and of the ``Material`` that it is made from: any of them can be made again.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longctx.evaluation.config import TaskOptions
    from longctx.evaluation.haystack import Haystack
    from longctx.evaluation.wording import Wording


@dataclass(frozen=True, slots=True)
class Cell:
    """Which prompt: everything that its random choices depend on."""

    task: str
    length: int  # tokens of the whole prompt, at most
    depth: int | None  # percent of the text before the answer; None: the task has no single place
    index: int  # which of the prompts that are otherwise alike
    seed: int

    def rng(self, purpose: str) -> random.Random:
        """A generator of its own for each purpose: one choice more does not change the others."""
        return random.Random(f"{self.seed}/{self.task}/{self.length}/{self.depth}/{self.index}/{purpose}")


@dataclass(frozen=True, slots=True)
class Material:
    """What prompts are made from; the same for all of a run."""

    options: "TaskOptions"
    wording: "Wording"
    haystack: "Haystack"
    measure: Callable[[str, str], int]  # tokens that a prompt with its lead is to the model, chat template included
    chars_per_token: float  # of the haystack, roughly
    max_prompt: int | None = None  # tokens that the model's context leaves a prompt, where that is less than its length


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, and what is expected of its answer."""

    prompt: str  # what the user of a chat says
    lead: str  # how the answer begins: a model without chat template continues ``prompt + lead``
    expected: tuple[str, ...]  # values, in any order
    pattern: str  # regular expression of one value
    ending: str  # a right answer, after the lead
    ignored: tuple[str, ...] = ()  # values that stand in the question: an answer may say them again

    def score(self, answer: str) -> tuple[float, tuple[str, ...]]:
        """The share of the expected values that the answer gives, 0 to 1, and the values that were taken from it.

        As many different values are taken as are expected, the first ones: naming everything does not help.
        """
        found = (match for match in re.findall(self.pattern, answer) if match not in self.ignored)
        got = tuple(dict.fromkeys(found))[: len(self.expected)]
        return len(set(got) & set(self.expected)) / len(self.expected), got


@dataclass(frozen=True, slots=True)
class Window:
    """Running text whose tokens' log probabilities are wanted."""

    text: str  # at least as many tokens as the cell's length, which cuts it


@dataclass(frozen=True, slots=True)
class Task:
    """One task: an entry of ``longctx.evaluation.tasks.TASKS``."""

    make: Callable[[Cell, Material], Case]
    has_depth: bool = False  # whether the answer stands at one place, which ``eval.depths`` chooses


@dataclass(frozen=True, slots=True)
class TextTask:
    """One task that scores given text instead of asking for an answer."""

    make: Callable[[Cell, Material], Window]
    has_depth: bool = False
