"""What is evaluated: a model in this process or behind an endpoint. No torch here."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt as a target takes it."""

    prompt: str
    lead: str
    max_tokens: int  # new tokens at most


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    text: str
    num_tokens: int  # of the whole prompt, as whoever computed it counted
    finish_reason: str


OnAnswer = Callable[[int, Answer], None]  # index of the question; called as answers come
OnProgress = Callable[[int, int], None]  # tokens of a long prompt computed, and in all


class Target(ABC):
    """A model to ask.

    Attributes:
        name: of the model.
        is_chat: whether prompts go through the model's chat template.
        max_context: tokens of prompt and answer together; None if nobody says.
        description: the model and how it runs, for the results.
    """

    name: str
    is_chat: bool
    max_context: int | None
    description: dict[str, Any]

    @abstractmethod
    def count(self, text: str) -> int:
        """Tokens of a piece of text."""

    @abstractmethod
    def measure(self, prompt: str, lead: str) -> int:
        """Tokens of a whole prompt as the model gets it: a chat with the template around it, else with the lead."""

    @abstractmethod
    def ask(self, questions: Sequence[Question], on_answer: OnAnswer, on_progress: OnProgress) -> None:
        """Answer all questions, greedily. Raises ``LongctxError`` if that cannot be done; answers so far were given."""

    @abstractmethod
    def score(self, text: str, num_tokens: int, on_progress: OnProgress) -> tuple[list[float], int]:
        """Natural-log probabilities of a text's first tokens after the very first, and the bytes that they are.

        Raises ``LongctxError`` if the text has fewer than ``num_tokens`` tokens.
        """

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""
