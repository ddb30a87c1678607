"""A request and its sequences as the engine works on them.

A request with ``n > 1`` starts as one sequence; after its prompt it is forked into n that share the prompt's full
pages.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from longctx.engine.export import KVExport
from longctx.engine.output import OutputText
from longctx.engine.sampling import SamplerState
from longctx.messages import GenerationRequest, OutputDelta, TokenLogprob
from longctx.models.tokenizer import Tokenizer
from memory.core_pages import CorePages
from memory.prefix_cache import DigestChain

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RopeLengths:
    """How rotary angles depend on a sequence's length (``longctx.models.rope``); the defaults say not at all.

    A token sees the length ``max(position + 1, floor)``: the floor is the prompt's length, so that the chunks of a
    prompt are rotated alike. Prefixes are shared only among sequences whose tokens were rotated alike.
    """

    threshold: int | None = None  # lengths up to this are alike
    restart_length: int | None = None  # a sequence that outgrows this is computed again with the new length
    is_binary: bool = False  # lengths above the threshold are alike, too

    def floor(self, prompt_len: int, num_tokens: int) -> int:
        """The shortest length that any token of the sequence sees once ``num_tokens`` are computed."""
        if self.restart_length is not None and prompt_len <= self.restart_length < num_tokens:
            return self.restart_length + 1
        return prompt_len

    def salt(self, floor: int) -> str:
        """What keeps prefixes apart that were rotated differently."""
        if self.threshold is None or floor <= self.threshold:
            return ""
        return "long" if self.is_binary else str(floor)


INDEPENDENT = RopeLengths()  # rotary angles that depend on positions alone


class ActiveRequest:
    """One request between ``Engine.add`` (or ``reserve``) and its last delta.

    Args:
        request: what was asked for.
        prompt: its token ids.
        arrival: number that grows with every request; earlier requests go first.
        seed: the seed in use.
        max_outputs: new tokens at most, clipped to the context.
        tokenizer: for text, and for the ids that end one.
        export: where the prompt's KV goes, on a prefill worker.
    """

    __slots__ = (
        "arrival", "export", "is_forked", "max_outputs", "num_announced_pages", "num_cached_tokens",
        "prompt", "request", "request_id", "seed", "sequences", "tokenizer",
    )  # fmt: skip

    def __init__(
        self,
        request: GenerationRequest,
        prompt: Int64Array,
        *,
        arrival: int,
        seed: int,
        max_outputs: int,
        tokenizer: Tokenizer,
        export: KVExport | None = None,
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.prompt = prompt
        self.arrival = arrival
        self.seed = seed
        self.max_outputs = max_outputs
        self.tokenizer = tokenizer
        self.export = export
        first = Sequence(self, 0, self.make_sampler(seed))
        self.sequences = [first]  # those not finished
        self.is_forked = bool(request.outputs)  # n sequences exist (or existed)
        if self.is_forked:
            self.sequences = [
                Sequence(self, index, first.sampler.fork(index)).resume(outputs)
                for index, outputs in enumerate(request.outputs)
                if outputs is not None
            ]
        self.num_cached_tokens = 0
        self.num_announced_pages = 0  # pages whose every layer ``export`` was told of

    @property
    def num_rows(self) -> int:
        """Decode rows this request will take before it is forked; none if it is decoded elsewhere."""
        return 0 if self.export is not None else self.request.sampling.n

    @property
    def unfinished_indices(self) -> list[int]:
        """Which of the n sequences have no finish reason yet."""
        return [s.index for s in self.sequences] if self.is_forked else list(range(self.request.sampling.n))

    def make_sampler(self, seed: int) -> SamplerState:
        """The sampling state of the first sequence at the prompt's end."""
        return SamplerState(
            self.request.sampling,
            seed=seed,
            index=0,
            prompt_token_ids=self.request.prompt_token_ids,
            eos_token_ids=self.tokenizer.eos_token_ids,
        )


class Sequence:
    """One continuation of a prompt: its tokens, its pages and how far its KV is computed."""

    __slots__ = (
        "active", "chain", "cores", "index", "key", "num_computed", "num_preemptions", "num_remembered", "outputs",
        "pages", "rope_floor", "row", "sampler", "text",
    )  # fmt: skip

    def __init__(self, active: ActiveRequest, index: int, sampler: SamplerState) -> None:
        self.active = active
        self.index = index  # which of the request's n
        self.key = (active.arrival, index)  # the order in which sequences are served
        self.sampler = sampler
        self.text = OutputText(active.tokenizer, active.request.sampling, eos_token_ids=active.tokenizer.eos_token_ids)
        self.chain: DigestChain | None = None  # None: it has no pages, or they are not shared
        self.rope_floor = len(active.prompt)  # RopeLengths.floor of what is computed
        self.outputs: list[int] = []
        self.pages: list[int] = []
        self.cores: CorePages | None = None  # under CCA attention, while it holds pages
        self.num_computed = 0  # tokens whose KV lies in ``pages``
        self.num_remembered = 0  # pages the prefix cache was told of
        self.num_preemptions = 0  # times that it gave its pages up for others
        self.row = -1  # index among the decode rows; -1: not decoding

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens."""
        return len(self.active.prompt) + len(self.outputs)

    def token_ids(self, start: int, stop: int) -> Int64Array:
        """Prompt and output tokens ``start`` to ``stop``."""
        prompt = self.active.prompt
        if stop <= len(prompt):
            return prompt[start:stop]
        tail = np.array(self.outputs[max(start - len(prompt), 0) : stop - len(prompt)], dtype=np.int64)
        return tail if start >= len(prompt) else np.concatenate((prompt[start:], tail))

    def first_samplers(self) -> list[SamplerState]:
        """The states that sample from the last token to be computed: n after a prompt, one after a preemption."""
        if self.active.is_forked:
            return [self.sampler]
        return [self.sampler, *(self.sampler.fork(index) for index in range(1, self.active.request.sampling.n))]

    def resume(self, token_ids: Iterable[int]) -> Self:
        """Append tokens that were sampled, and their text passed on, elsewhere. Returns this sequence."""
        for token_id in token_ids:
            self.outputs.append(token_id)
            self.sampler.append(token_id)
            self.text.push(token_id)
        return self

    def accept(self, token_id: int, logprob: TokenLogprob | None) -> OutputDelta:
        """Append a sampled token; the delta says whether it was the last."""
        active = self.active
        self.outputs.append(token_id)
        self.sampler.append(token_id)
        text, finish_reason, stop_reason = self.text.push(token_id)
        if finish_reason is None and len(self.outputs) >= active.max_outputs:
            finish_reason = "length"
            text += self.text.finish()
        return OutputDelta(
            active.request_id,
            self.index,
            (token_id,),
            text,
            () if logprob is None else (logprob,),
            finish_reason,
            stop_reason,
            len(active.prompt),
            active.num_cached_tokens,
        )
