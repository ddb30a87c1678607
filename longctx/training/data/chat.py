"""Which characters of a rendered chat the assistant wrote: those are trained on. No torch here.

Templates say nothing about it (but for ``{% generation %}`` tags, which few have), so beginnings of the conversation
are rendered: up to an assistant's turn with the prompt for it, and up to its end. What lies between them in the whole
conversation's text is the turn, its end-of-turn token included: what the model has to write when it is served.
"""

import re
from collections.abc import Sequence
from typing import Any

from longctx.errors import DataError
from longctx.models.tokenizer import Tokenizer

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDY = "put {% generation %} tags around what the assistant writes, in a template of your own (data.chat_template)"


def marks_turns(template: str) -> bool:
    """Whether a chat template itself says what the assistant writes."""
    return _GENERATION_TAG.search(template) is not None


def render_turns(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as one text, and the characters ``[start, end)`` of each assistant turn.

    Raises:
        RequestError: the template rejects the messages.
        DataError: the template writes the beginning of a conversation otherwise once it goes on.
    """
    text = tokenizer.render_chat(messages, add_generation_prompt=False)
    turns = []
    for idx, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if idx == 0:
            raise DataError("the assistant's turn comes first; it answers nothing")
        start = _find_start(tokenizer, text, messages[:idx])
        end = _find_end(tokenizer, text, start, messages[: idx + 1])
        turns.append((start, end))
    return text, turns


def _find_start(tokenizer: Tokenizer, text: str, before: Sequence[dict[str, Any]]) -> int:
    asked = tokenizer.render_chat(before)
    if text.startswith(asked):
        return len(asked)
    # Templates of reasoning models may ask with "<think>" and leave it out of turns that are past.
    if not text.startswith(tokenizer.render_chat(before, add_generation_prompt=False)):
        raise DataError(
            f"the chat template writes messages before turn {len(before) + 1} otherwise once the chat goes on; "
            + _REMEDY
        )
    return next(idx for idx, pair in enumerate(zip(text + "\0", asked, strict=False)) if pair[0] != pair[1])


def _find_end(tokenizer: Tokenizer, text: str, start: int, so_far: Sequence[dict[str, Any]]) -> int:
    ended = tokenizer.render_chat(so_far, add_generation_prompt=False)
    # The whole of it is in the text, unless it begins with reasoning that is left out of turns that are past.
    first = text[start : start + 1]
    cut = ended.find(first, start)
    while 0 <= cut < len(ended.rstrip()):
        tail = ended[cut:]
        if text.startswith(tail, start):
            turn = tail.rstrip()
            # White space after the end-of-turn token is the template's: a model that is served has stopped by then.
            return start + len(turn if turn.endswith(tokenizer.special_tokens) else tail)
        cut = ended.find(first, cut + 1)
    raise DataError(f"the chat template writes turn {len(so_far)} otherwise once the chat goes on; {_REMEDY}")
