"""Checks a request against the model and the pool before it takes anything."""

from collections.abc import Sequence

import numpy as np

from longctx.engine.sampling import validate
from longctx.engine.sequence import Int64Array
from longctx.errors import RequestError
from longctx.messages import GenerationRequest


def check_request(
    request: GenerationRequest,
    *,
    vocab_size: int,
    max_context: int,
    model_context: int,
    max_sequences: int,
    hidden_token_id: int | None = None,
) -> Int64Array:
    """The prompt's token ids as an array.

    Args:
        request: what was asked for.
        vocab_size: token ids are below this.
        max_context: tokens of prompt and output together that fit the model and the pool.
        model_context: what would fit if the pool were large enough, for the error text.
        max_sequences: sequences one engine decodes together.
        hidden_token_id: a token id that no prompt may have.

    Raises:
        RequestError: naming the field at fault, what it is and what is allowed.
    """
    validate(request.sampling, vocab_size=vocab_size)
    if request.sampling.n > max_sequences:
        raise RequestError(
            f"n={request.sampling.n} is not allowed: at most {max_sequences} sequences run together "
            "(engine.max_sequences)",
            param="n",
        )
    prompt = _read_prompt(request.prompt_token_ids, vocab_size)
    if hidden_token_id is not None and (prompt == hidden_token_id).any():
        place = int(np.flatnonzero(prompt == hidden_token_id)[0])
        raise RequestError(
            f"prompt token id {hidden_token_id} at position {place} is not allowed: it is the landmark's, which the "
            "engine puts in by itself",
            param="prompt",
        )
    _check_outputs(request, vocab_size, max_context - len(prompt))
    if len(prompt) + 1 > max_context:
        limit = f"the context is {max_context} tokens, prompt and at least one new token together"
        if max_context < model_context:
            limit += f" (the model's {model_context} do not fit the KV budget, engine.kv_bytes)"
        raise RequestError(
            f"the prompt has {len(prompt)} tokens; {limit}", param="prompt", code="context_length_exceeded"
        )
    return prompt


def _check_outputs(request: GenerationRequest, vocab_size: int, room: int) -> None:
    outputs, params = request.outputs, request.sampling
    if not outputs:
        return
    if len(outputs) != params.n or all(tokens is None for tokens in outputs):
        raise RequestError(
            f"outputs of {len(outputs)} sequences are not allowed with n={params.n}: one for each, not all ended",
            param="outputs",
        )
    if params.seed is None and params.temperature > 0:
        raise RequestError("outputs are not allowed without the seed that they were sampled with", param="seed")
    most = room if params.max_tokens is None else min(params.max_tokens, room)
    for tokens in outputs:
        if tokens is not None and len(tokens) >= most:
            raise RequestError(f"outputs of {len(tokens)} tokens leave room for none: {most} in all", param="outputs")
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise RequestError(f"outputs hold token ids that are not 0 to {vocab_size - 1}", param="outputs")


def _read_prompt(token_ids: Sequence[int], vocab_size: int) -> Int64Array:
    if len(token_ids) == 0:
        raise RequestError("the prompt is empty; give at least one token", param="prompt")
    array = np.asarray(token_ids)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RequestError(f"prompt token ids must be integers from 0 to {vocab_size - 1}", param="prompt")
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if len(outside):
        place = int(outside[0])
        raise RequestError(
            f"prompt token id {int(array[place])} at position {place} is not allowed: 0 to {vocab_size - 1}",
            param="prompt",
        )
    return array.astype(np.int64)
