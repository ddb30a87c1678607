"""Rows become documents: token ids, and labels that say which of them are trained on. No torch here.

A text is trained on as a whole, a completion or a chat's assistant turns without what comes before. Texts and
completions end with EOS; a chat ends as its template ends it.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from longctx.errors import CheckpointError, ConfigError, DataError, RequestError
from longctx.models.tokenizer import Tokenizer
from longctx.training.data.chat import marks_turns, render_turns
from longctx.training.data.config import DataConfig

IGNORED = -100  # a label that does not count, as in transformers
SLICE_CHARACTERS = 1 << 22  # of a long text are encoded at a time, which takes a hundred bytes a character

Spans = Sequence[tuple[int, int]]  # characters [start, end)


@dataclass(frozen=True, slots=True)
class Document:
    """One row's tokens.

    ``ids`` and ``labels`` are int32 ``[num_tokens]``; labels are not shifted. A ``divisible`` document loses nothing
    but context when it is cut: it is trained on as a whole.
    """

    place: str
    ids: np.ndarray
    labels: np.ndarray
    divisible: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text, before it is encoded.

    ``trained`` are the characters that are trained on, None for all. ``ends`` says whether BOS and EOS go around it.
    """

    place: str
    text: str
    trained: Spans | None
    ends: bool


class DocumentEncoder:
    """Makes documents of rows.

    Args:
        config: the keys of rows.
        tokenizer: the model's, with the chat template in use.

    Raises:
        CheckpointError: the tokenizer has no EOS.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        if tokenizer.end_token_id is None:
            raise CheckpointError("the tokenizer has no EOS token, so that a document cannot end; set its eos_token")
        self._config, self._tokenizer = config, tokenizer
        self.end_id: int = tokenizer.end_token_id  # after texts and completions
        self._marks_turns = marks_turns(tokenizer.chat_template or "")

    def render(self, place: str, row: dict[str, Any]) -> Rendered | Document:
        """The row's text, or the document at once where the chat template marks the assistant's turns.

        Raises:
            DataError: naming ``place``: keys are missing, or a value is of the wrong type or empty.
            ConfigError: there is a chat, but no chat template.
        """
        config = self._config
        present = {key: value for key, value in row.items() if value is not None}
        try:
            if config.messages_key in present:
                return self._render_chat(place, _read_messages(present[config.messages_key], config.messages_key))
            if config.prompt_key in present and config.completion_key in present:
                prompt = _read_text(present, config.prompt_key, may_be_empty=True)
                text = prompt + _read_text(present, config.completion_key)
                return Rendered(place, text, [(len(prompt), len(text))], ends=True)
            if config.text_key in present:
                return Rendered(place, _read_text(present, config.text_key), None, ends=True)
            raise DataError(_explain_keys(config, present))
        except (DataError, RequestError) as error:
            raise DataError(f"{place}: {error}") from None

    def encode(self, rows: Sequence[Rendered]) -> list[Document | DataError]:
        """Documents of ``rows``, or why there is none; texts without a prompt are encoded together."""
        whole = [row for row in rows if row.trained is None and len(row.text) <= SLICE_CHARACTERS]
        ids_of_whole = iter(self._tokenizer.encode_batch([row.text for row in whole]))
        documents: list[Document | DataError] = []
        for row in rows:
            trained = None
            if row.trained is None:
                ids = next(ids_of_whole) if len(row.text) <= SLICE_CHARACTERS else self._encode_long(row.text)
            else:
                ids, trained = encode_trained(self._tokenizer, row.text, row.trained)
            if row.ends:
                begin_ids = self._tokenizer.begin_token_ids
                ids = [*begin_ids, *ids, self.end_id]
                trained = None if trained is None else [*[False] * len(begin_ids), *trained, True]
            try:
                documents.append(_make_document(row.place, ids, trained))
            except DataError as error:
                documents.append(DataError(f"{row.place}: {error}"))
        return documents

    def _encode_long(self, text: str) -> list[int]:
        first, *further = slice_text(text)
        ids = self._tokenizer.encode_batch([first])[0]
        for piece in further:
            ids += self._tokenizer.encode_spans(piece, continues=True)[0]
        return ids

    def _render_chat(self, place: str, messages: list[dict[str, Any]]) -> Rendered | Document:
        if self._tokenizer.chat_template is None:
            raise ConfigError(
                f"{place} is a chat, but the model has no chat template; set data.chat_template to a Jinja file"
            )
        if self._marks_turns:
            return _make_document(place, *self._tokenizer.encode_marked_chat(messages))
        text, turns = render_turns(self._tokenizer, messages)
        return Rendered(place, _check_unicode(text, self._config.messages_key), turns, ends=False)


def has_target(labels: np.ndarray) -> bool:
    """Whether a document's tokens teach anything: its first token is predicted from nothing."""
    return bool((labels[1:] != IGNORED).any())


def slice_text(text: str) -> Iterator[str]:
    """``text`` in slices of at most ``SLICE_CHARACTERS``, cut after a newline where there is one."""
    start = 0
    while len(text) - start > SLICE_CHARACTERS:
        stop = text.rfind("\n", start, start + SLICE_CHARACTERS) + 1 or start + SLICE_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def encode_trained(tokenizer: Tokenizer, text: str, trained: Spans) -> tuple[list[int], list[bool]]:
    """Token ids of ``text``, and for each whether it lies in the spans ``trained``, which are in order.

    The text is encoded as a whole. Where a token would reach over the end of a span it is cut there and encoded in
    parts: a model that is served never sees such a token either, since its prompt ends there.
    """
    ids, places = tokenizer.encode_spans(text)
    edges = sorted({edge for span in trained for edge in span if 0 < edge < len(text)})
    last_before = [places[bisect_left(places, (edge, 0)) - 1] for edge in edges]  # the token that begins last before it
    crossed = [edge for edge, (_, end) in zip(edges, last_before, strict=True) if end > edge]
    if crossed:
        ids, places = [], []
        for start, stop in pairwise([0, *crossed, len(text)]):
            part_ids, part_places = tokenizer.encode_spans(text[start:stop], continues=start > 0)
            ids += part_ids
            places += [(start + first, start + end) for first, end in part_places]
    spans, span_idx, inside = list(trained), 0, []
    for start, end in places:
        while span_idx < len(spans) and start >= spans[span_idx][1]:
            span_idx += 1
        inside.append(span_idx < len(spans) and spans[span_idx][0] < end)
    return ids, inside


def _make_document(place: str, ids: Sequence[int], trained: Sequence[bool | int] | None) -> Document:
    id_array = np.asarray(ids, dtype=np.int32)
    labels = id_array if trained is None else np.where(np.asarray(trained, dtype=bool), id_array, np.int32(IGNORED))
    if not has_target(labels):
        raise DataError(f"there is nothing to train on in its {len(ids)} tokens")
    return Document(place, id_array, labels, divisible=trained is None)


def _read_text(row: dict[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    text = row[key]
    if not isinstance(text, str):
        raise DataError(f"{key!r} must be text, not {type(text).__name__}")
    if not may_be_empty and not text.strip():
        raise DataError(f"{key!r} is empty")
    return _check_unicode(text, key)


def _check_unicode(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{key!r} is not valid Unicode at character {error.start + 1} (half a surrogate pair)"
        ) from None
    return text


def _read_messages(messages: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else type(messages).__name__
        raise DataError(f"{key!r} must be a list of messages, not {what}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"message {number} of {key!r} must be an object with a 'role' and a 'content'")
        if message.get("content") is None and not message.get("tool_calls"):
            raise DataError(f"message {number} of {key!r} has no 'content'")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{key!r} has no message of the role 'assistant' to train on")
    # Arrow gives every message the keys that any message has.
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def _explain_keys(config: DataConfig, row: dict[str, Any]) -> str:
    wanted = f"{config.text_key!r}, {config.prompt_key!r} with {config.completion_key!r}, or {config.messages_key!r}"
    return f"has none of the keys that are trained on: {wanted}; it has {', '.join(map(repr, row)) or 'none'}"
