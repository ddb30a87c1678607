"""The JSON of an answer, whole or in chunks, for both kinds of request.

A chunk is a prefix and a suffix made once per sequence around one escaped text: that is all a token costs here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.logprobs import TokenTexts, chat_logprobs, completion_logprobs
from longctx.messages import OutputDelta, TokenLogprob

escape = json.encoder.encode_basestring_ascii  # one string as JSON
DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Choice:
    """One sequence so far, for an answer in one piece."""

    texts: list[str] = field(default_factory=list, repr=False)
    logprobs: list[TokenLogprob] = field(default_factory=list, repr=False)
    finish_reason: str | None = None

    def add(self, delta: OutputDelta) -> None:
        """Append what is new."""
        self.texts.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason


class AnswerFormat(Protocol):
    """How one kind of answer is written. ``choice_idx`` counts sequences over all prompts of the request."""

    def open(self, choice_idx: int) -> bytes:
        """Events before a sequence's first delta."""
        ...

    def events(self, choice_idx: int, delta: OutputDelta) -> bytes:
        """Events that carry ``delta``; may be empty."""
        ...

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """The event after the last delta that carries the usage."""
        ...

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece."""
        ...


class EventFrame:
    """What every event of one answer has around the part that changes."""

    def __init__(self, head: dict[str, Any], *, include_usage: bool) -> None:
        self.head = head
        self._head = json.dumps(head, separators=(",", ":"))[:-1]
        self.end = "]%s}\n\n" % (',"usage":null' if include_usage else "")

    def start(self, choice_idx: int) -> str:
        """Up to the fields of the choice after its index."""
        return f'data: {self._head},"choices":[{{"index":{choice_idx},'

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """The event with no choices and the usage."""
        return f'data: {self._head},"choices":[],"usage":{json.dumps(usage)}}}\n\n'.encode()


class CompletionFormat:
    """``text_completion`` objects.

    Args:
        head: id, object, created and model.
        num_choices: sequences in all.
        echoes: the prompt's text of each sequence, put before its output; empty strings without ``echo``.
        texts: of tokens.
        include_usage: chunks say ``"usage": null``, as the official API does.
    """

    def __init__(self, head: dict[str, Any], echoes: Sequence[str], *, texts: TokenTexts, include_usage: bool) -> None:
        self._frame = EventFrame(head, include_usage=include_usage)
        self._echoes = echoes
        self._texts = texts
        self._prefixes = [self._frame.start(idx) + '"text":' for idx in range(len(echoes))]
        self._suffix = ',"logprobs":null,"finish_reason":null}' + self._frame.end
        self._offsets = [len(echo) for echo in echoes]  # characters of each sequence's tokens so far

    def open(self, choice_idx: int) -> bytes:
        """The prompt, if it is echoed."""
        echo = self._echoes[choice_idx]
        return (self._prefixes[choice_idx] + escape(echo) + self._suffix).encode() if echo else b""

    def events(self, choice_idx: int, delta: OutputDelta) -> bytes:
        """One chunk."""
        if delta.finish_reason is None and not delta.logprobs:
            return (self._prefixes[choice_idx] + escape(delta.text) + self._suffix).encode() if delta.text else b""
        logprobs = self._logprobs(choice_idx, delta.logprobs)
        ending = (
            f',"logprobs":{json.dumps(logprobs)},"finish_reason":{json.dumps(delta.finish_reason)}}}{self._frame.end}'
        )
        return (self._prefixes[choice_idx] + escape(delta.text) + ending).encode()

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """See ``AnswerFormat``."""
        return self._frame.usage_event(usage)

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """See ``AnswerFormat``."""
        entries = [
            {
                "index": idx,
                "text": self._echoes[idx] + "".join(choice.texts),
                "logprobs": self._logprobs(idx, choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for idx, choice in enumerate(choices)
        ]
        return self._frame.head | {"choices": entries, "usage": usage}

    def _logprobs(self, choice_idx: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        shaped = completion_logprobs(logprobs, self._texts, offset=self._offsets[choice_idx])
        self._offsets[choice_idx] += sum(map(len, shaped["tokens"]))
        return shaped


class ChatFormat:
    """``chat.completion`` and ``chat.completion.chunk`` objects; arguments as in ``CompletionFormat``."""

    def __init__(self, head: dict[str, Any], num_choices: int, *, texts: TokenTexts, include_usage: bool) -> None:
        self._frame = EventFrame(head | {"object": "chat.completion.chunk"}, include_usage=include_usage)
        self._head = head
        self._texts = texts
        self._starts = [self._frame.start(idx) for idx in range(num_choices)]
        self._prefixes = [start + '"delta":{"content":' for start in self._starts]
        self._suffix = '},"logprobs":null,"finish_reason":null}' + self._frame.end

    def open(self, choice_idx: int) -> bytes:
        """The role."""
        role = '"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}'
        return (self._starts[choice_idx] + role + self._frame.end).encode()

    def events(self, choice_idx: int, delta: OutputDelta) -> bytes:
        """A chunk with the text, then one with the finish reason."""
        chunks = ""
        if delta.logprobs:
            logprobs = json.dumps(chat_logprobs(delta.logprobs, self._texts))
            middle = f'}},"logprobs":{logprobs},"finish_reason":null}}'
            chunks = self._prefixes[choice_idx] + escape(delta.text) + middle + self._frame.end
        elif delta.text:
            chunks = self._prefixes[choice_idx] + escape(delta.text) + self._suffix
        if delta.finish_reason is not None:
            finish = f'"delta":{{}},"logprobs":null,"finish_reason":"{delta.finish_reason}"}}'
            chunks += self._starts[choice_idx] + finish + self._frame.end
        return chunks.encode()

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """See ``AnswerFormat``."""
        return self._frame.usage_event(usage)

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """See ``AnswerFormat``."""
        entries = [
            {
                "index": idx,
                "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
                "logprobs": chat_logprobs(choice.logprobs, self._texts) if choice.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for idx, choice in enumerate(choices)
        ]
        return self._head | {"choices": entries, "usage": usage}
