"""Rows that nobody has to fetch: ``data.path=demo``, what the shipped models are trained on.

Running text of the Python standard library, and documents of it that hide facts which are asked for, as a chat or as
running text (``longctx/models/demo_data.py``). A row is a function of its number. ``demo-held-out`` has the files that
``demo`` leaves out.
"""

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from longctx.models import demo_data
from longctx.training.data.config import DataConfig
from longctx.training.data.sources import DEMO_NAMES

NUM_ROWS = 1 << 20
_CHAT_SHARE = 0.8  # of rows with facts
_ONE_FACT_SHARE = 0.3
_MAX_ASKED = 4  # facts of a chat that are asked for, one in each turn
_TURN_CHARACTERS = 24  # of a turn's marks
_LEAST_TEXT = 20  # characters around the facts


class DemoRows:
    """Generated rows.

    Args:
        files: one of ``DEMO_NAMES``.
        config: how long rows are, how many hide facts, and the keys that they have their parts under.
    """

    def __init__(self, files: list[Path], config: DataConfig) -> None:
        self._name, self._config = files[0].name, config
        self._corpus = _load_corpora()[DEMO_NAMES.index(self._name)]

    def __len__(self) -> int:
        return NUM_ROWS

    def place(self, row_idx: int) -> str:
        return f"{self._name}#{row_idx}"

    def read(self, row_idx: int) -> dict[str, Any]:
        config, rng = self._config, random.Random(f"{self._name} {row_idx}")
        if rng.random() >= config.demo_recall:
            return {config.text_key: self._corpus.draw_lines(rng, config.demo_tokens)}
        num_facts = 1 if rng.random() < _ONE_FACT_SHARE else rng.randint(min(2, config.demo_facts), config.demo_facts)
        facts = demo_data.make_facts(rng, num_facts)
        is_chat = rng.random() < _CHAT_SHARE
        num_asked = _MAX_ASKED if is_chat else 1
        while len(facts) > 1 and self._find_room(facts, num_asked) < _LEAST_TEXT:
            facts.pop()
        rng.shuffle(facts)
        text = self._corpus.draw_lines(rng, max(_LEAST_TEXT, self._find_room(facts, num_asked)))
        spans = demo_data.hide(text, facts, [rng.random() for _ in facts], rng)
        document = "".join(span.text for span in spans)
        asked = facts[:num_asked]
        if is_chat:
            return {config.messages_key: _make_chat(document, asked)}
        question = f"{asked[0].question} " if rng.random() < 0.8 else ""
        prompt = f"{document}\n\n{question}{asked[0].lead}"
        return {config.prompt_key: prompt, config.completion_key: f" {asked[0].value}."}

    def _find_room(self, facts: list[demo_data.Fact], num_asked: int) -> int:
        """Characters of a row that facts, and the questions for the longest of them, leave."""
        told = sum(len(fact.sentence) + 1 for fact in facts)
        turns = sorted(len(fact.question) + len(fact.answer) + _TURN_CHARACTERS for fact in facts)
        return self._config.demo_tokens - told - sum(turns[-num_asked:])


def _make_chat(document: str, asked: list[demo_data.Fact]) -> list[dict[str, str]]:
    messages = []
    for turn, fact in enumerate(asked):
        question = fact.question if turn else f"{document}\n\n{fact.question}"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": fact.answer}]
    return messages


@lru_cache(maxsize=1)
def _load_corpora() -> tuple[demo_data.Corpus, demo_data.Corpus]:
    return demo_data.load_corpora()
