"""Text to token ids and back, with the checkpoint's own tokenizer and chat template. No torch here.

transformers reads the files and renders chat templates; encoding and decoding call the Rust tokenizer below it, which
releases the interpreter's lock and changes no state, so that threads can share it. ``AutoTokenizer`` is not used: it
imports torch, which the HTTP endpoint does without. Left out: SentencePiece files without a tokenizer.json.
"""

import copy
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from longctx.errors import CheckpointError, RequestError
from longctx.models.checkpoint import ModelSpec

SLICE_CHARACTERS_PER_TOKEN = 8  # of texts that may fit, few have more
MAX_SLICE_CHARACTERS = 1 << 20
SLICE_SLACK_TOKENS = 16  # a cut may add a few tokens
# What a template may raise over messages or variables that it was not written for.
_TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_ANCHOR = "\n"  # a token of its own where a space is put before texts


class Tokenizer:
    """The tokenizer of one checkpoint. Safe to use from several threads.

    Args:
        tokenizer: transformers' wrapper.
        eos_token_ids: ids that end a text.
        model_name: for error messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, eos_token_ids: frozenset[int], model_name: str) -> None:
        self._wrapper = tokenizer
        self._rust = tokenizer.backend_tokenizer
        self._rust.no_truncation()
        self._rust.no_padding()
        self._model_name = model_name
        self.eos_token_ids = eos_token_ids
        self.vocab_size: int = self._rust.get_vocab_size(with_added_tokens=True)

    def has_token(self, token_id: int) -> bool:
        """Whether a text can have this token."""
        return self._rust.id_to_token(token_id) is not None

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template in use."""
        template = self._wrapper.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return template

    @property
    def end_token_id(self) -> int | None:
        """What ends a text; if several ids do, the tokenizer's own EOS."""
        own = self._wrapper.eos_token_id
        return own if isinstance(own, int) else min(self.eos_token_ids, default=None)

    @cached_property
    def begin_token_ids(self) -> list[int]:
        """What the checkpoint puts before a text (BOS), often nothing."""
        around_nothing = self.encode("")
        return around_nothing[:-1] if around_nothing[-1:] == [self.end_token_id] else around_nothing

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Special tokens as they stand in a text."""
        return tuple(token.content for token in self._wrapper.added_tokens_decoder.values() if token.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, with the special tokens (BOS) that the checkpoint puts around a text.

        Raises ``RequestError`` for text that is no valid Unicode (lone surrogates).
        """
        try:
            # Only the batch calls release the interpreter's lock; this one leaves out the offsets, a third of the time.
            return self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (UnicodeEncodeError, TypeError):
            raise RequestError("the prompt is not valid Unicode text", param="prompt") from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of valid Unicode texts, without special tokens around them."""
        return [encoding.ids for encoding in self._rust.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_spans(self, text: str, *, continues: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Like one text of ``encode_batch``, and each token's characters, ``[start, end)`` in ``text``.

        Tokens of one character's bytes all have that character. A text that ``continues`` another one gets no space
        before it from tokenizers that put one before every text (SentencePiece).
        """
        anchor = _ANCHOR if continues and self._puts_space_before else ""
        encoding = self._rust_without_trimming.encode_batch([anchor + text], add_special_tokens=False)[0]
        num_dropped = sum(start < len(anchor) for start, _ in encoding.offsets)
        places = [(start - len(anchor), end - len(anchor)) for start, end in encoding.offsets[num_dropped:]]
        return encoding.ids[num_dropped:], places

    def exceeds(self, text: str, num_tokens: int) -> bool:
        """Whether ``text`` surely has more than ``num_tokens`` tokens; False if only ``encode`` can tell.

        Encoding takes a hundred bytes a character and more. Texts far too long are counted here in slices, as far as it
        takes; those that may well fit are not looked at.
        """
        slice_size = SLICE_CHARACTERS_PER_TOKEN * num_tokens
        if len(text) <= slice_size:
            return False
        slice_size = min(slice_size, MAX_SLICE_CHARACTERS)
        num_counted = 0
        for start in range(0, len(text), slice_size):
            num_counted += len(self.encode(text[start : start + slice_size], add_special_tokens=False))
            num_counted -= SLICE_SLACK_TOKENS
            if num_counted > num_tokens:
                return True
        return False

    def render_chat(self, messages: Sequence[dict[str, Any]], **template_kwargs: Any) -> str:
        """The chat as one text, ready for the assistant's answer.

        Args:
            messages: OpenAI messages, ``{"role": ..., "content": ...}``.
            template_kwargs: passed to the template; ``add_generation_prompt`` is True unless given.

        Raises:
            RequestError: there is no chat template, or it rejects the messages.
        """
        text = self._apply_template(messages, tokenize=False, **({"add_generation_prompt": True} | template_kwargs))
        assert isinstance(text, str)
        return text

    def encode_marked_chat(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Token ids of a chat, and 1 for each that the template's ``{% generation %}`` tags enclose, else 0.

        Raises ``RequestError`` as ``render_chat`` does.
        """
        marked = self._apply_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return marked["input_ids"], marked["assistant_masks"]

    def encode_chat(self, messages: Sequence[dict[str, Any]], **template_kwargs: Any) -> list[int]:
        """Token ids of ``render_chat``; the template itself writes BOS where the model wants one."""
        text = self.render_chat(messages, **template_kwargs)
        try:
            return self.encode(text, add_special_tokens=False)
        except RequestError as error:
            raise RequestError("a message is not valid Unicode text", param="messages") from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD, ids the tokenizer does not know become nothing."""
        return self._rust.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def _puts_space_before(self) -> bool:
        return self.encode_batch(["x"])[0] != self.encode_batch([_ANCHOR + "x"])[0][-1:]

    @cached_property
    def _rust_without_trimming(self) -> Any:
        """A copy without the post-processor, which may leave white space out of tokens' characters."""
        tokenizer = copy.deepcopy(self._rust)
        tokenizer.post_processor = None
        return tokenizer

    def _apply_template(self, messages: Sequence[dict[str, Any]], **options: Any) -> Any:
        template = self.chat_template
        if template is None:
            reason = f"model {self._model_name!r} has no chat template; use /v1/completions, or set model.chat_template"
            raise RequestError(reason, param="messages")
        if not messages:
            raise RequestError("messages is empty; give at least one", param="messages")
        try:
            return self._wrapper.apply_chat_template(list(messages), chat_template=template, **options)
        except _TEMPLATE_ERRORS as error:
            raise RequestError(f"the chat template rejects the messages: {error}", param="messages") from error


def load_tokenizer(spec: ModelSpec, chat_template_file: str | Path | None = None) -> Tokenizer:
    """The tokenizer in ``spec.path``.

    Args:
        spec: from ``inspect_checkpoint``.
        chat_template_file: a Jinja file to use instead of the tokenizer's own chat template.

    Raises:
        CheckpointError: files are missing or cannot be read.
    """
    if not (spec.path / "tokenizer.json").is_file():
        raise CheckpointError(f"{spec.path}: {_explain_missing(spec.path)}")
    try:
        wrapper = PreTrainedTokenizerFast.from_pretrained(spec.path, local_files_only=True)
    except Exception as error:  # the Rust parser raises plain Exception
        raise CheckpointError(f"{spec.path}: the tokenizer cannot be read: {error}") from error
    if chat_template_file is not None:
        wrapper.chat_template = _read_template(Path(chat_template_file))
    eos_token_ids = spec.eos_token_ids
    if not eos_token_ids and isinstance(wrapper.eos_token_id, int):
        eos_token_ids = frozenset({wrapper.eos_token_id})
    return Tokenizer(wrapper, eos_token_ids=eos_token_ids, model_name=spec.name)


def _explain_missing(folder: Path) -> str:
    if any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "spiece.model")):
        how = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        return f"tokenizer.json is missing; make it once from the files that are there: {how}"
    return "tokenizer.json is missing, and no other tokenizer file is there"


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: the chat template cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: the chat template is not UTF-8 text") from None
