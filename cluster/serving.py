"""What the HTTP endpoint asks of whatever generates: the protocol, and the descriptions that pass through it.

The endpoint (`cluster/endpoint.py`) knows only this file. `cluster/local_backend.py` implements it with one engine in
the process, `cluster/router.py` with prefill and decode workers. Neither ray nor torch here.
"""

import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from longctx.errors import LongctxError
from longctx.messages import EngineStats, GenerationRequest, OutputDelta, SamplingParams
from longctx.models.checkpoint import ModelSpec, choose_context
from longctx.models.config import ModelConfig


class NotReadyError(LongctxError):
    """No worker can take a request yet, or any more; the text says why."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as clients see it."""

    name: str  # what a request's ``model`` must say
    created: int  # seconds since the epoch at which serving began
    max_context: int  # tokens of prompt and output together
    vocab_size: int  # prompt token ids are below it
    sampling: SamplingParams = field(
        default_factory=SamplingParams
    )  # what a request leaves out (generation_config.json)


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """One worker, for ``/metrics``, ``/status`` and ``longctx status``."""

    name: str
    role: str  # "prefill", "decode", or "engine" for one that does both
    engine: EngineStats
    host: str = ""
    pid: int = 0
    transport: str = ""  # how its KV travels; empty if it does not
    bytes_shipped: int = 0  # KV bytes sent to other workers since the start
    num_shipped: int = 0  # prompts whose KV other workers have acknowledged
    residual_s: float = 0.0  # of all of them: seconds from the first token to the acknowledgement
    sp_degree: int = 1  # ranks that share its sequences
    pool: str = ""  # "mixed" while it has work that it was not started for, else its role
    draining: bool = False  # it takes nothing new
    alive: bool = True  # false: not there yet, or lost; ``engine`` is what was last heard
    starting: bool = False  # it has not been there yet


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Requests that no worker has yet."""

    num_waiting: int = 0
    num_for_prefill: int = 0  # because the prefill workers have enough to compute
    num_for_decode: int = 0  # because no decode worker has room
    prefill_tokens: int = 0  # of the prompts that wait for prefill workers


@dataclass(frozen=True, slots=True)
class StartStatus:
    """A worker that is being started."""

    name: str  # empty: not chosen yet
    stage: str  # "placing": it waits for room in the Ray cluster; "loading" the model
    waited_s: float


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """The workers of one role, and what became of them by autoscaling; without it only how many there are."""

    role: str
    num_live: int = 0  # take requests
    num_starting: int = 0
    num_draining: int = 0
    min_workers: int | None = None
    max_workers: int | None = None
    target_workers: int | None = None  # with those that are being started, without those that drain
    starts: tuple[StartStatus, ...] = ()
    decision: str = ""  # the last one
    reason: str = ""  # for it
    decided_at: float | None = None  # seconds since the epoch
    num_grown: int = 0  # decisions to grow since the start
    num_shrunk: int = 0
    num_failed: int = 0  # starts that failed
    retry_s: float = 0.0  # seconds until the next start is tried after one that failed


@dataclass(frozen=True, slots=True)
class WorkerHealth:
    """Whether one worker takes requests."""

    name: str
    role: str
    ready: bool
    reason: str = ""  # why not


@dataclass(frozen=True, slots=True)
class Health:
    """Whether requests can be served now, and if not, why."""

    ready: bool
    reason: str = ""
    workers: tuple[WorkerHealth, ...] = ()


class PromptTokenizer(Protocol):
    """What the endpoint needs of ``longctx.models.tokenizer.Tokenizer``."""

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, with a beginning-of-sequence id if the model wants one."""
        ...

    def exceeds(self, text: str, num_tokens: int, /) -> bool:
        """Whether ``text`` surely has more tokens than that: asked before ``encode`` takes memory for all of it."""
        ...

    def render_chat(self, messages: Sequence[dict[str, Any]], /, **template_kwargs: Any) -> str:
        """A conversation as text with all special tokens; raises ``RequestError`` if the template does not take it."""
        ...

    def decode(self, ids: Sequence[int], /, *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ...


class ServingBackend(Protocol):
    """Something that generates. All methods are called on one event loop."""

    @property
    def model(self) -> ServedModel:
        """What is served."""
        ...

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The model's tokenizer; called from several threads."""
        ...

    async def start(self) -> None:
        """Get ready; called once, before the first request."""
        ...

    async def stop(self) -> None:
        """End what is in flight and release everything."""
        ...

    def check_queue(self) -> None:
        """Raise ``QueueFullError`` if a request would find the queue full; asked before its body is read."""
        ...

    def submit(self, request: GenerationRequest) -> AsyncIterator[list[OutputDelta]]:
        """What is new, as it comes, until each of the request's n sequences has a ``finish_reason``.

        Closing the generator, or cancelling the task that waits in it, cancels the request everywhere and frees its
        pages. Iteration raises ``RequestError``, ``QueueFullError``, ``NotReadyError`` or ``WorkerLostError``.
        """
        ...

    def worker_of(self, request_id: str) -> str:
        """Name of the worker that generates for a request in flight; empty if none does yet."""
        ...

    async def health(self) -> Health:
        """Whether requests can be served now."""
        ...

    async def worker_stats(self) -> list[WorkerStats]:
        """Every worker's state, within a second."""
        ...

    def queue(self) -> QueueStats:
        """What waits outside the workers."""
        ...


def describe_model(spec: ModelSpec, config: ModelConfig) -> ServedModel:
    """The model of a checked checkpoint, served from now on; raises ``ConfigError`` if its context is too long."""
    recommended = {name: value for name, value in dataclasses.asdict(spec.sampling).items() if value is not None}
    return ServedModel(
        name=config.name or spec.name,
        created=int(time.time()),
        max_context=choose_context(spec, config.max_context),
        vocab_size=spec.vocab_size,
        sampling=SamplingParams(**recommended),
    )
