"""What crosses a process in serving: frozen, slotted dataclasses without I/O. (KV leases: ``memory/messages.py``.)

No torch here: the endpoint, the router and the CLI read this file. A ``repr`` shows nothing that a client sent or got:
it may be logged.
"""

from dataclasses import dataclass, field
from typing import Literal

SEED_BITS = 63
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How one request attends, where the model is served with CCA; None: as the engine is configured."""

    group_size: int | None = None  # tokens that become one core
    window: int | None = None  # tokens that each query sees as they are


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Names and meaning follow the OpenAI API and vLLM's extensions of it.

    ``longctx.engine.sampling.validate`` checks values; construction does not.
    """

    n: int = 1  # sequences sampled from one prompt
    max_tokens: int | None = 16  # new tokens at most; None: up to the context length
    min_tokens: int = 0  # end-of-sequence and stop ids are not sampled before this many new tokens
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # nucleus mass, (0, 1]
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # relative to the most likely token, [0, 1]
    seed: int | None = None  # None: drawn at random when the request is added
    stop: tuple[str, ...] = field(default=(), repr=False)  # strings that end the text; not part of the output
    # Ids that end the text, besides the model's own end-of-sequence ids.
    stop_token_ids: tuple[int, ...] = field(default=(), repr=False)
    ignore_eos: bool = False  # go on past end-of-sequence (benchmarks)
    presence_penalty: float = 0.0  # [-2, 2]
    frequency_penalty: float = 0.0  # [-2, 2]
    repetition_penalty: float = 1.0  # > 0; applies to prompt and output tokens
    logprobs: int | None = None  # None: off; 0: the chosen token; k: also the k most likely, at most 20
    logit_bias: tuple[tuple[int, float], ...] = field(default=(), repr=False)  # (token id, added to its logit)
    attention: AttentionOptions | None = None  # how it attends to its context; an extension of ours


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to continue it."""

    request_id: str
    prompt_token_ids: tuple[int, ...] = field(repr=False)
    sampling: SamplingParams
    cache_salt: str = field(default="", repr=False)  # prefixes are shared only within one salt
    # Tokens that each of the n sequences has; None: it has ended.
    outputs: tuple[tuple[int, ...] | None, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of one sampled token, before penalties and temperature, with the most likely alternatives."""

    token_id: int = field(repr=False)
    logprob: float
    top: tuple[tuple[int, float], ...] = field(default=(), repr=False)  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """What a prefill worker sampled at the prompt's last position; travels in the KV transfer's commit frame."""

    token_ids: tuple[int, ...] = field(repr=False)  # one for each of the n sequences
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)  # one for each, if asked for
    seed: int = 0  # the seed in use, drawn by the prefill worker if the request had none
    num_cached_tokens: int = 0  # prompt tokens found in the prefill worker's prefix cache


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What is new in one sequence of one request since the last delta."""

    request_id: str
    index: int  # which of the request's n sequences
    token_ids: tuple[int, ...] = field(repr=False)
    text: str = field(repr=False)  # decoded text that can no longer change; stop strings are cut off
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)  # one per token id, if asked for
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = field(default=None, repr=False)  # the stop string or token id that matched
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens whose KV was not computed for this request
    error: str | None = None  # with finish_reason "error"


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One worker's state, for routing, ``longctx status`` and metrics."""

    num_waiting: int = 0  # requests not yet started
    num_running: int = 0  # sequences that hold pages
    pending_prefill_tokens: int = 0  # prompt tokens still to be computed
    num_pages: int = 0
    num_pages_used: int = 0  # held by a sequence or a lease
    num_pages_cached: int = 0  # free but still holding a shared prefix
    page_size: int = 0
    kv_bytes: int = 0  # budget
    num_preemptions: int = 0
    num_prompt_tokens: int = 0  # prompt tokens taken in since the start
    num_cached_tokens: int = 0  # of which found in the prefix cache
    num_generated_tokens: int = 0
    attention: str = ""  # name of the attention implementation in use
    device: str = ""
    dtype: str = ""
    details: dict[str, float] = field(default_factory=dict)
