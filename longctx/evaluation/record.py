"""What is kept of every prompt: enough to judge it again, and to make it again."""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

from longctx.evaluation.case import Case, Cell
from longctx.evaluation.target import Answer
from longctx.evaluation.tasks.perplexity import Bucket, measure_perplexity

Key = tuple[str, int, int | None, int]


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One prompt's outcome; a line of ``prompts.jsonl``."""

    task: str
    length: int  # tokens asked for
    depth: int | None  # percent
    index: int
    seed: int
    score: float  # share of the expected values that were found; of perplexity, the perplexity
    expected: tuple[str, ...]
    got: tuple[str, ...]
    answer: str
    num_tokens: int  # of the prompt, as the model counted them
    max_tokens: int  # that the answer could have
    finish_reason: str
    sha256: str  # of the prompt's text, with the lead
    buckets: tuple[Bucket, ...] = ()  # of perplexity
    bits_per_byte: float | None = None  # of perplexity

    @property
    def key(self) -> Key:
        """Which prompt it is."""
        return self.task, self.length, self.depth, self.index

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def make_record(cell: Cell, case: Case, answer: Answer, max_tokens: int) -> PromptRecord:
    """Of a prompt that was answered."""
    score, got = case.score(answer.text)
    return PromptRecord(
        **_name_cell(cell),
        score=score,
        expected=case.expected,
        got=got,
        answer=answer.text,
        num_tokens=answer.num_tokens,
        max_tokens=max_tokens,
        finish_reason=answer.finish_reason,
        sha256=_digest(case.prompt + case.lead),
    )


def make_text_record(cell: Cell, text: str, buckets: list[Bucket], num_bytes: int) -> PromptRecord:
    """Of a text that was scored."""
    nll = sum(bucket.nll for bucket in buckets)
    return PromptRecord(
        **_name_cell(cell),
        score=measure_perplexity(buckets),
        expected=(),
        got=(),
        answer="",
        num_tokens=cell.length,
        max_tokens=0,
        finish_reason="",
        sha256=_digest(text),
        buckets=tuple(buckets),
        bits_per_byte=nll / (0.6931471805599453 * num_bytes),
    )


def read_record(values: dict[str, Any]) -> PromptRecord:
    """A record from its JSON; raises ``TypeError`` or ``KeyError`` if it is none."""
    values = values | {
        "expected": tuple(values["expected"]),
        "got": tuple(values["got"]),
        "buckets": tuple(Bucket(**bucket) for bucket in values["buckets"]),
    }
    return PromptRecord(**values)


def _name_cell(cell: Cell) -> dict[str, Any]:
    return dataclasses.asdict(cell)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
