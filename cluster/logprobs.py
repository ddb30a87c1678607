"""Log probabilities in the two shapes of the OpenAI API, over token texts that are decoded once each."""

from collections.abc import Sequence
from typing import Any

from cluster.serving import PromptTokenizer
from longctx.messages import TokenLogprob

REPLACEMENT = "\ufffd"
LOWEST = -9999.0  # JSON has no infinity; OpenAI writes this for it


class TokenTexts:
    """Texts of single tokens."""

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def get(self, token_id: int) -> str:
        """The token's text, special tokens included; U+FFFD for part of a character."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text


def chat_logprobs(logprobs: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """The ``logprobs`` of a chat choice."""
    content = [
        _chat_entry(texts.get(entry.token_id), entry.logprob)
        | {"top_logprobs": [_chat_entry(texts.get(token_id), logprob) for token_id, logprob in entry.top]}
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(logprobs: Sequence[TokenLogprob], texts: TokenTexts, *, offset: int) -> dict[str, Any]:
    """The ``logprobs`` of a completion choice.

    Args:
        logprobs: one for each token.
        texts: of tokens.
        offset: characters of the choice's tokens before these.
    """
    tokens = [texts.get(entry.token_id) for entry in logprobs]
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
        "top_logprobs": [_by_text(entry, texts) for entry in logprobs],
        "text_offset": offsets,
    }


def _by_text(entry: TokenLogprob, texts: TokenTexts) -> dict[str, float]:
    """Keyed by text as the API wants it; of two tokens with one text the likelier stays. Has the sampled token, too."""
    by_text: dict[str, float] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        by_text.setdefault(texts.get(token_id), _finite(logprob))
    return by_text


def _chat_entry(text: str, logprob: float) -> dict[str, Any]:
    encoded = None if REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": _finite(logprob), "bytes": encoded}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
