"""``longctx generate``: one prompt, answered in the terminal as it comes."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.adapters.folder import choose_adapter
from longctx.attention.config import choose_method
from longctx.cli.generate_config import GenerateCommandConfig, GenerateConfig
from longctx.errors import ConfigError
from longctx.messages import SamplingParams
from longctx.models.checkpoint import inspect_checkpoint

if TYPE_CHECKING:
    from longctx.llm import LLM

PROGRESS_INTERVAL_S = 0.2


class ProgressLine:
    """One line on standard error that follows a prompt's computation."""

    def __init__(self, *, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._started = time.perf_counter()
        self._last = 0.0

    def update(self, num_computed: int, num_tokens: int) -> None:
        """Show how far the prompt is; cheap between two refreshes."""
        now = time.perf_counter()
        if not self._is_shown or num_computed >= num_tokens or now - self._last < PROGRESS_INTERVAL_S:
            return
        self._last = now
        rate = num_computed / max(now - self._started, 1e-9)
        share = 100 * num_computed / num_tokens
        text = f"\rprompt: {num_computed}/{num_tokens} tokens ({share:.0f} %), {rate:.0f} tokens/s"
        print(text, end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line away."""
        if self._last:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self._last = 0.0


def generate(config: GenerateCommandConfig) -> int:
    """Run the command; returns the exit code."""
    options = config.generate
    text = _read_prompt(options)
    spec, _ = choose_adapter(config.model.adapter, inspect_checkpoint(config.model.path))
    choose_method(config.attention, spec)
    from longctx.llm import LLM  # seconds of torch and transformers, after what can be refused without them

    with LLM(model_config=config.model, engine_config=config.engine, attention_config=config.attention) as llm:
        is_chat = options.chat == "true" or (options.chat == "auto" and llm.tokenizer.chat_template is not None)
        prompt = llm.encode_chat([{"role": "user", "content": text}]) if is_chat else llm.encode_prompt(text)
        _answer(llm, prompt, options)
    return 0


def _answer(llm: "LLM", prompt: list[int], options: GenerateConfig) -> None:
    params = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        seed=options.seed,
        stop=tuple(options.stop),
    )
    is_shown = options.progress == "true" or (options.progress == "auto" and sys.stderr.isatty())
    line = ProgressLine(is_shown=is_shown)
    started = time.perf_counter()
    first = last = started
    num_tokens = 0
    reason, num_cached = None, 0
    for delta in llm.stream(prompt, params, on_progress=line.update):
        last = time.perf_counter()
        if not num_tokens:
            first = last
            line.clear()
        num_tokens += len(delta.token_ids)
        reason, num_cached = delta.finish_reason or reason, delta.num_cached_tokens
        print(delta.text, end="", flush=True)
    print(flush=True)
    per_token = f"{1e3 * (last - first) / (num_tokens - 1):.1f} ms per token" if num_tokens > 1 else "one token"
    cached = f", {num_cached} of them cached" if num_cached else ""
    print(
        f"[{len(prompt)} prompt tokens{cached}, first token after {first - started:.2f} s "
        f"({len(prompt) / max(first - started, 1e-9):.0f} tokens/s); {num_tokens} new tokens, {per_token}; "
        f"ended by {reason}]",
        file=sys.stderr,
    )


def _read_prompt(options: GenerateConfig) -> str:
    """The document and the prompt as one text."""
    parts = []
    if options.prompt_file == "-":
        parts.append(sys.stdin.read())
    elif options.prompt_file is not None:
        try:
            parts.append(Path(options.prompt_file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"generate.prompt_file={options.prompt_file!r} cannot be read: {error}") from None
    if options.prompt is not None:
        parts.append(options.prompt)
    text = "\n\n".join(part for part in parts if part)
    if not text:
        raise ConfigError("there is no prompt: set generate.prompt=TEXT, generate.prompt_file=FILE, or both")
    return text
