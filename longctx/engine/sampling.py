"""Chooses tokens: validation of sampling parameters, one sequence's state, and the sampler over a step's rows.

The order is bias, penalties, forbidden ends, temperature, top-k, top-p, min-p, then the inverse of the cumulative
distribution at a counter-based uniform number. Every row is treated by itself in float64, so that it does not depend on
its batch; rows without any of this are one argmax. Log probabilities are those of the raw logits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longctx.engine.random_stream import draw_uniform
from longctx.errors import RequestError
from longctx.messages import AttentionOptions, SamplingParams, TokenLogprob

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 100.0
FIRST_CANDIDATES = 1024  # looked at before a whole vocabulary is sorted


@dataclass(frozen=True, slots=True)
class _Range:
    """What a number may be."""

    low: float
    high: float = math.inf
    is_low_open: bool = False

    def holds(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.low < value if self.is_low_open else self.low <= value)
            and value <= self.high
        )

    def __str__(self) -> str:
        start = f"above {self.low:g}" if self.is_low_open else f"at least {self.low:g}"
        return start if math.isinf(self.high) else f"{start} and at most {self.high:g}"


_RANGES = {
    "n": _Range(1, MAX_N),
    "max_tokens": _Range(1),
    "min_tokens": _Range(0),
    "temperature": _Range(0),
    "top_p": _Range(0, 1, is_low_open=True),
    "top_k": _Range(0),
    "min_p": _Range(0, 1),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "repetition_penalty": _Range(0, is_low_open=True),
    "logprobs": _Range(0, MAX_LOGPROBS),
}


def validate(params: SamplingParams, *, vocab_size: int) -> None:
    """Raise ``RequestError`` for the first field that is out of range, naming it, its value and what is allowed."""
    for name, allowed in _RANGES.items():
        value = getattr(params, name)
        if value is not None and not allowed.holds(value):
            raise RequestError(f"{name}={value} is not allowed: it must be {allowed}", param=name)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(
            f"min_tokens={params.min_tokens} is not allowed: it must be at most max_tokens={params.max_tokens}",
            param="min_tokens",
        )
    if len(params.stop) > MAX_STOP_STRINGS or any(not text for text in params.stop):
        raise RequestError(f"stop takes at most {MAX_STOP_STRINGS} strings, none of them empty", param="stop")
    for name, ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", tuple(token_id for token_id, _ in params.logit_bias)),
    ):
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"{name} holds {token_id}; token ids are 0 to {vocab_size - 1}", param=name)
    for name in AttentionOptions.__slots__ if params.attention is not None else ():
        value = getattr(params.attention, name)
        if value is not None and value < 1:
            raise RequestError(f"attention.{name}={value} is not allowed: at least 1", param="attention")
    for token_id, bias in params.logit_bias:
        if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias of token {token_id} is {bias}; it must be -{MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}",
                param="logit_bias",
            )


class SamplerState:
    """One sequence's sampling state.

    Args:
        params: the request's.
        seed: the seed in use.
        index: which of the request's n sequences.
        prompt_token_ids: for the repetition penalty.
        eos_token_ids: the model's ends of text.
    """

    __slots__ = (
        "_counts",
        "_prompt",
        "eos_token_ids",
        "index",
        "is_greedy",
        "is_plain",
        "num_output",
        "params",
        "seed",
    )

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        index: int,
        prompt_token_ids: Sequence[int],
        eos_token_ids: frozenset[int],
    ) -> None:
        self.params, self.seed, self.index, self.eos_token_ids = params, seed, index, eos_token_ids
        self.num_output = 0
        self._counts: dict[int, int] = {}
        self._prompt = prompt_token_ids if params.repetition_penalty != 1.0 else ()
        self.is_greedy = params.temperature == 0.0
        changes_logits = (
            params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0 or params.logit_bias
        )
        self.is_plain = not changes_logits and params.logprobs is None and not params.min_tokens

    def append(self, token_id: int) -> None:
        """Note a token that was sampled."""
        self.num_output += 1
        if not self.is_plain:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1

    def fork(self, index: int) -> "SamplerState":
        """The same history, drawing as another of the request's sequences."""
        twin = SamplerState(
            self.params,
            seed=self.seed,
            index=index,
            prompt_token_ids=self._prompt,
            eos_token_ids=self.eos_token_ids,
        )
        twin.num_output, twin._counts = self.num_output, dict(self._counts)
        return twin

    def adjust(self, logits_V: torch.Tensor) -> None:
        """Apply bias, penalties and forbidden ends to one row, in place."""
        params = self.params
        for token_id, bias in params.logit_bias:
            logits_V[token_id] += bias
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*self._prompt, *self._counts}), device=logits_V.device)
            values = logits_V[seen]
            penalty = params.repetition_penalty
            logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if self._counts and (params.frequency_penalty or params.presence_penalty):
            ids = torch.tensor(list(self._counts), device=logits_V.device)
            counts = torch.tensor(list(self._counts.values()), dtype=logits_V.dtype, device=logits_V.device)
            logits_V[ids] -= counts * params.frequency_penalty + params.presence_penalty
        if self.num_output < params.min_tokens:
            ends = [*self.eos_token_ids, *params.stop_token_ids]
            logits_V[torch.tensor(ends, dtype=torch.long, device=logits_V.device)] = -math.inf


class Sampler:
    """Samples one token per row.

    Args:
        vocab_size: columns of the logits.
        device: where they are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device

    @torch.inference_mode()
    def sample(
        self, logits_RV: torch.Tensor, states: Sequence[SamplerState]
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """One token for each row; log probabilities where they are asked for.

        Args:
            logits_RV: float32 ``[R, V]``; changed in place.
            states: R states; the caller appends the tokens to them.
        """
        raw: dict[int, torch.Tensor] = {}
        for row, state in enumerate(states):
            if not state.is_plain:
                if state.params.logprobs is not None:
                    raw[row] = logits_RV[row].log_softmax(-1)
                state.adjust(logits_RV[row])
        if all(state.is_greedy for state in states):
            token_ids = logits_RV.argmax(-1).tolist()
        else:
            token_ids = [
                int(logits.argmax()) if state.is_greedy else _draw(logits, state)
                for logits, state in zip(logits_RV, states, strict=True)
            ]
        if not raw:
            return token_ids, [None] * len(token_ids)
        return token_ids, [
            _read_logprob(raw[row], token_id, states[row].params.logprobs or 0) if row in raw else None
            for row, token_id in enumerate(token_ids)
        ]


def _draw(logits_V: torch.Tensor, state: SamplerState) -> int:
    """One token of one row by the inverse of its cumulative distribution."""
    params = state.params
    uniform = draw_uniform(state.seed, state.index, state.num_output)
    scaled_V = logits_V.double() / params.temperature
    limit = min(params.top_k or len(scaled_V), len(scaled_V))
    if params.min_p > 0:
        limit = min(limit, int((scaled_V >= scaled_V.max() + math.log(params.min_p)).sum()))
    if limit == len(scaled_V) and params.top_p == 1.0:
        return _invert((scaled_V - scaled_V.max()).exp().cumsum(-1), uniform)
    if limit > FIRST_CANDIDATES and params.top_p < 1.0 and not params.top_k:
        # The nucleus is nearly always among the first candidates; whether it is, their own mass tells.
        mass = scaled_V.logsumexp(-1)
        values, ids = scaled_V.topk(FIRST_CANDIDATES)
        cumulative = (values - mass).exp().cumsum(-1)
        if float(cumulative[-1]) >= params.top_p:
            return int(ids[_invert(_cut_nucleus(cumulative, params.top_p), uniform)])
    values, ids = scaled_V.topk(limit)
    # top-p is a share of what top-k left; min-p cuts afterwards.
    kept = scaled_V.topk(min(params.top_k, len(scaled_V))).values if params.top_k else scaled_V
    cumulative = (values - kept.logsumexp(-1)).exp().cumsum(-1)
    return int(ids[_invert(_cut_nucleus(cumulative, params.top_p), uniform)])


def _cut_nucleus(cumulative: torch.Tensor, top_p: float) -> torch.Tensor:
    """The shortest prefix whose mass reaches ``top_p``, at least one token."""
    if top_p >= 1.0:
        return cumulative
    return cumulative[: int((cumulative < top_p).sum()) + 1]


def _invert(cumulative: torch.Tensor, uniform: float) -> int:
    """The first position whose cumulative mass exceeds ``uniform`` of the whole."""
    target = cumulative[-1] * uniform
    return min(int(torch.searchsorted(cumulative, target, right=True)), len(cumulative) - 1)


def _read_logprob(logprobs_V: torch.Tensor, token_id: int, num_top: int) -> TokenLogprob:
    values, ids = logprobs_V.topk(min(num_top, len(logprobs_V)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs_V[token_id]), top)
