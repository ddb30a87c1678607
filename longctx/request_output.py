"""What ``LLM.generate`` returns: everything generated from one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from longctx.messages import FinishReason, GenerationRequest, OutputDelta, TokenLogprob


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """One finished continuation of a prompt."""

    index: int  # which of the request's n
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    stop_reason: str | int | None  # the stop string or token id that matched
    logprobs: tuple[TokenLogprob, ...]  # one per token id, if asked for


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """Everything generated from one prompt."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[SequenceOutput, ...]  # n of them, by index
    num_cached_tokens: int  # prompt tokens found in the prefix cache


def collect_output(request: GenerationRequest, deltas: Sequence[OutputDelta]) -> RequestOutput:
    """The output of one request out of all its deltas."""
    outputs = []
    for index in range(request.sampling.n):
        own = [delta for delta in deltas if delta.index == index]
        outputs.append(
            SequenceOutput(
                index,
                token_ids=tuple(chain.from_iterable(delta.token_ids for delta in own)),
                text="".join(delta.text for delta in own),
                finish_reason=own[-1].finish_reason,
                stop_reason=own[-1].stop_reason,
                logprobs=tuple(chain.from_iterable(delta.logprobs for delta in own)),
            )
        )
    return RequestOutput(request.prompt_token_ids, tuple(outputs), deltas[-1].num_cached_tokens)
