"""From a checked request to generation requests: tokenises, off the event loop when it takes long."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from cluster.openai_schema import Call, ChatCall, CompletionCall, Prompt
from cluster.serving import PromptTokenizer, ServedModel
from longctx.errors import RequestError
from longctx.messages import GenerationRequest

T = TypeVar("T")
INLINE_CHARACTERS = 4096  # shorter texts are tokenised in less time than a thread takes


async def encode_prompts(call: CompletionCall, tokenizer: PromptTokenizer, model: ServedModel) -> list[tuple[int, ...]]:
    """Token ids of every prompt; raises ``RequestError`` if a text is far too long."""

    def encode(prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt
        _check_text(prompt, tokenizer, model, param="prompt")
        return tuple(tokenizer.encode(prompt))

    return await _run(lambda: [encode(prompt) for prompt in call.prompts], sum(map(len, call.prompts)))


async def echo_prompts(call: CompletionCall, tokenizer: PromptTokenizer) -> list[str]:
    """The prompts' texts, once for each of their sequences; empty without ``echo``."""
    if not call.echo:
        return [""] * (len(call.prompts) * call.sampling.n)

    def decode(prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else tokenizer.decode(list(prompt), skip_special_tokens=False)

    texts = await _run(lambda: [decode(prompt) for prompt in call.prompts], sum(map(len, call.prompts)))
    return [text for text in texts for _ in range(call.sampling.n)]


async def encode_messages(call: ChatCall, tokenizer: PromptTokenizer, model: ServedModel) -> list[tuple[int, ...]]:
    """Token ids of the conversation, as the only prompt; raises ``RequestError`` if it is far too long."""

    def encode() -> tuple[int, ...]:
        text = tokenizer.render_chat(call.messages, **call.template_kwargs)
        _check_text(text, tokenizer, model, param="messages")
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    return [await _run(encode, sum(len(message["content"]) for message in call.messages))]


def make_requests(
    prompts: Sequence[tuple[int, ...]], call: Call, *, cache_salt: str, model: ServedModel, request_id: str, param: str
) -> list[GenerationRequest]:
    """One request for each prompt; raises ``RequestError`` if one is empty or leaves no room for output.

    Args:
        prompts: token ids.
        call: how to continue them.
        cache_salt: the call's, and its tenant's.
        model: gives the limits.
        request_id: of the HTTP request.
        param: the field that held the prompts.
    """
    for prompt in prompts:
        if not prompt:
            raise RequestError(f"{param} is empty; it must hold at least one token", param=param)
        if len(prompt) >= model.max_context:
            raise _too_long(f"{len(prompt)} tokens", model, param=param)
    return [
        GenerationRequest(f"{request_id}-{i}", prompt, call.sampling, cache_salt) for i, prompt in enumerate(prompts)
    ]


def _check_text(text: str, tokenizer: PromptTokenizer, model: ServedModel, *, param: str) -> None:
    if tokenizer.exceeds(text, model.max_context):
        raise _too_long(f"{len(text)} characters, which are more than {model.max_context} tokens", model, param=param)


def _too_long(has: str, model: ServedModel, *, param: str) -> RequestError:
    text = (
        f"the prompt has {has}; this model's context is {model.max_context} tokens of prompt and output together, "
        f"so a prompt may have {model.max_context - 1}"
    )
    return RequestError(text, param=param, code="context_length_exceeded")


async def _run(work: Callable[[], T], num_characters: int) -> T:
    return work() if num_characters <= INLINE_CHARACTERS else await asyncio.to_thread(work)
