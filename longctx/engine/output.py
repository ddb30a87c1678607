"""Token ids of one sequence become text that can no longer change, and perhaps an end.

A window of recent tokens is decoded again with each new one, so that what a token means may depend on its neighbours
(leading spaces, characters split over tokens). Replacement characters at the end may still become a character: they are
held back, at most three of them, which is what an unfinished UTF-8 sequence can decode to. So is text that may be the
beginning of a stop string.
"""

from collections.abc import Iterable
from typing import Protocol

from longctx.messages import FinishReason, SamplingParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_HELD_REPLACEMENTS = 3
WINDOW = 8  # tokens decoded again before the window moves on
MAX_WINDOW = 64  # also where the text never becomes clean


class Decoder(Protocol):
    """What a tokenizer must offer."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str: ...


class OutputText:
    """One sequence's text.

    Args:
        tokenizer: decodes ids.
        params: stop strings and ids, ``ignore_eos``, ``min_tokens``.
        eos_token_ids: the model's ends of text.
    """

    __slots__ = (
        "_emitted",
        "_eos",
        "_held",
        "_min_tokens",
        "_num_tokens",
        "_stop_ids",
        "_stops",
        "_tokenizer",
        "_window",
    )

    def __init__(self, tokenizer: Decoder, params: SamplingParams, *, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._stops = params.stop
        self._stop_ids = frozenset(params.stop_token_ids)
        self._eos = frozenset() if params.ignore_eos else eos_token_ids
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that were passed on
        self._held = ""  # passed on by the window, perhaps the beginning of a stop string

    def push(self, token_id: int) -> tuple[str, FinishReason | None, str | int | None]:
        """New text, whether the sequence ends here, and the stop string or id that ended it."""
        self._num_tokens += 1
        may_stop = self._num_tokens > self._min_tokens or self._min_tokens == 0
        if may_stop and token_id in self._stop_ids:
            return self.finish(), "stop", token_id
        if may_stop and token_id in self._eos:
            return self.finish(), "stop", None
        text = self._decode(token_id)
        return self._scan(text) if self._stops and self._num_tokens >= self._min_tokens else (text, None, None)

    def finish(self) -> str:
        """Text still held back, when no further token comes."""
        rest = self._tokenizer.decode(self._window)[self._emitted :] if self._window else ""
        text, self._held, self._window, self._emitted = self._held + rest, "", [], 0
        return text

    def _decode(self, token_id: int) -> str:
        window = self._window
        window.append(token_id)
        text = self._tokenizer.decode(window)
        num_open = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_HELD_REPLACEMENTS)
        if num_open and len(window) >= MAX_WINDOW:
            num_open = 0
        stable = len(text) - num_open
        new = text[self._emitted : stable]
        self._emitted = max(self._emitted, stable)
        if not num_open and len(window) >= WINDOW:
            del window[:-1]  # one token of context for the next one's leading space
            self._emitted = len(self._tokenizer.decode(window))
        return new

    def _scan(self, text: str) -> tuple[str, FinishReason | None, str | None]:
        text = self._held + text
        found = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            place, stop = min(found)
            self._held, self._window, self._emitted = "", [], 0
            return text[:place], "stop", stop
        num_held = max(_overlap(text, stop) for stop in self._stops)
        cut = len(text) - num_held
        self._held = text[cut:]
        return text[:cut], None, None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
