"""What the router knows of one worker, and of one request on its way."""

import asyncio
import logging
import math
import secrets
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from cluster.config import ClusterConfig
from cluster.delta_buffer import DeltaBuffer
from cluster.handle import WorkerHandle
from cluster.messages import LineAddress, WorkerInfo, WorkerReport
from cluster.placed_prefixes import PlacedPrefixes, digest_prefix
from cluster.policies.policy import WorkerLoad, count_pending
from cluster.serving import WorkerHealth, WorkerStats
from cluster.worker_line import CALLS, Line
from longctx.errors import WorkerLostError, WorkerSilentError
from longctx.messages import SEED_BITS, EngineStats, GenerationRequest, OutputDelta

logger = logging.getLogger(__name__)

T = TypeVar("T")

Connect = Callable[[LineAddress], Awaitable[Line]]

END_TRIES = 5  # to have a silent process killed
PREFILL_WINDOW = 4  # a worker is given this many batches' prompt tokens at most, or one prompt


@dataclass(slots=True, eq=False)
class WorkerPeer:
    """One worker, as last heard."""

    handle: WorkerHandle
    call_timeout_s: float  # for what it answers between two steps
    deployment: str = ""  # that it has to belong to, if it says
    connect: Connect | None = None  # to where it listens
    info: WorkerInfo | None = None
    transports: tuple[str, ...] = ()  # what it can send with
    is_alive: bool = False
    is_draining: bool = False  # it takes nothing new
    reason: str = "it is loading the model"  # why not alive
    is_silent: bool = False  # that is all that is known of it
    stats: WorkerStats | None = None
    pending: list[int] = field(default_factory=list)  # tokens of each prompt placed here that is to be computed
    num_prompts: int = 0  # placed here to be computed that prefill workers are for
    num_requests: int = 0  # placed here to be decoded, not finished
    prefixes: PlacedPrefixes = field(default_factory=PlacedPrefixes)
    _session: str = ""  # what the worker knows this router by since it joined
    _line: Line | None = None
    _answers: set[asyncio.Future[Any]] = field(default_factory=set)  # awaited

    @property
    def name(self) -> str:
        return self.handle.name

    @property
    def role(self) -> str:
        return self.handle.role

    @property
    def sp_degree(self) -> int:
        """Ranks that share its sequences."""
        return self.info.sp_degree if self.info else 1

    async def join(self, config: ClusterConfig) -> WorkerInfo:
        """Wait until it has loaded the model, and make it forget what came before. Raises what went wrong."""
        start = self.handle.call("start")
        info: WorkerInfo = await _within(config.start_timeout_s, start, failure="it did not load the model in")
        if info.deployment and info.deployment != self.deployment:
            raise WorkerLostError("it belongs to another deployment, with another configuration")
        self._session = uuid.uuid4().hex
        await self.call("reset", self._session)
        self.transports = await self.call("transports")
        if self.connect is not None and self.handle.is_far:
            self._line = await self._open_line(self.connect)
        self.prefixes.clear()
        self.info, self.is_alive, self.reason = info, True, ""
        return info

    async def poll(self, config: ClusterConfig) -> WorkerReport:
        """What is new; raises ``WorkerLostError`` if it is silent or not the one that joined."""
        line, session = self._line, self._session
        news = line.next_report() if line is not None else self.handle.call("poll", config.heartbeat_s, session)
        timeout_s = config.heartbeat_s + config.worker_timeout_s
        report: WorkerReport = await _within(timeout_s, news, failure="it gave no sign of life for")
        if self.info is None or report.incarnation != self.info.incarnation:
            raise WorkerLostError("it was restarted")
        return report

    async def _open_line(self, connect: Connect) -> Line | None:
        """None if it cannot be reached so: Ray's calls are slower, and go on working."""
        try:
            address: LineAddress = await self.call("listen", self._session)
            return await connect(address)
        except OSError as error:  # TimeoutError and ssl.SSLError among them
            reason = str(error) or type(error).__name__
            logger.warning("%s: %s; its tokens come by Ray's calls, milliseconds later each", self.name, reason)
            return None

    async def call(self, method: str, *args: Any) -> Any:
        """What the worker answers.

        Raises what it raised, ``WorkerLostError`` as soon as ``lose`` is called, ``TimeoutError`` if it takes too long.
        """
        there = self._line if self._line is not None and method in CALLS else self.handle
        answer = asyncio.ensure_future(there.call(method, *args))
        self._answers.add(answer)
        try:
            await asyncio.wait({answer}, timeout=self.call_timeout_s)
            if answer.cancelled():
                raise self.loss()
            if not answer.done():
                raise TimeoutError(f"{self.name} did not answer within {self.call_timeout_s:g} s")
            return answer.result()
        finally:
            self._answers.discard(answer)
            answer.cancel()

    def lose(self, reason: str, *, is_silent: bool) -> None:
        """Nothing more is expected of it; who waits for an answer is told so."""
        self.is_alive, self.reason, self.is_silent = False, reason, is_silent
        self.hang_up()
        for answer in self._answers:
            answer.cancel()

    def loss(self) -> WorkerLostError:
        """What who needs it is told."""
        kind = WorkerSilentError if self.is_silent else WorkerLostError
        return kind(f"{self.name} is lost: {self.reason}")

    async def end_if_silent(self, after_s: float) -> None:
        """Have its process killed if it is still lost then: a frozen one would be in the way of another.

        Some times, if that does not help: its node may be too busy to do it at once, or out of reach for a while.
        """
        info = self.info
        for _ in range(END_TRIES):
            await asyncio.sleep(after_s)
            if info is None or self.is_alive or self.info is not info:  # joined since
                return
            logger.error("%s stays silent: its process (pid %d on %s) is killed", self.name, info.pid, info.host)
            await self.handle.end_process(info)

    def hang_up(self) -> None:
        """Close the connection to it."""
        line, self._line = self._line, None
        if line is not None:
            line.close()

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""
        return self.is_alive and not self.is_draining

    @property
    def pool(self) -> str:
        """What it does at the moment: its role, or ``"mixed"`` with work that it was not started for."""
        return "mixed" if self.load().is_mixed else self.role

    def load(self, digests: Sequence[bytes] = (), *, num_tokens: int = 0, batch_tokens: int = 0) -> WorkerLoad:
        """What a policy sees when it places a prompt with these prefixes.

        Args:
            digests: of the prompt's prefixes.
            num_tokens: of the prompt.
            batch_tokens: of one step of one rank.
        """
        engine = self.stats.engine if self.stats else EngineStats()
        num_cached = self.prefixes.count_tokens(digests)
        return WorkerLoad(
            self.name,
            self.info.node_id if self.info else "",
            count_pending(self.pending, max(0, num_tokens - num_cached)),
            self.num_requests,
            num_free_pages=engine.num_pages - engine.num_pages_used,
            num_cached_tokens=num_cached,
            role=self.role,
            num_prompts=self.num_prompts,
            max_pending_tokens=PREFILL_WINDOW * batch_tokens * self.sp_degree,
        )

    def count_uncached(self, flight: "Flight") -> int:
        """Prompt tokens of ``flight`` that it would probably compute."""
        return flight.num_tokens - self.prefixes.count_tokens(flight.digests)

    def expect(self, flight: "Flight") -> None:
        """The prompt of ``flight`` will be in the prefix cache."""
        assert self.info is not None
        num_held = self.stats.engine.num_pages * self.stats.engine.page_size if self.stats else 0
        self.prefixes.add(flight.digests, max_tokens=num_held or self.info.max_context)

    def transport_to(self, decode: "WorkerPeer") -> str:
        """``shared_memory`` on one host if this one's pool allows it, else ``tcp``; or the one that is configured."""
        assert self.info is not None and decode.info is not None
        if len(self.transports) == 1:
            return self.transports[0]
        return "shared_memory" if self.info.node_id == decode.info.node_id else "tcp"

    def health(self) -> WorkerHealth:
        """For ``/health``."""
        reason = ("it is draining" if self.is_draining else "") if self.is_alive else self.reason
        return WorkerHealth(self.name, self.role, self.is_open, reason)

    def describe(self) -> WorkerStats:
        """For ``/status`` and ``/metrics``: what was last heard."""
        known = self.stats or WorkerStats(self.name, self.role, EngineStats())
        return WorkerStats(
            self.name,
            self.role,
            known.engine,
            host=known.host or (self.info.host if self.info else ""),
            pid=known.pid or (self.info.pid if self.info else 0),
            transport=known.transport,
            bytes_shipped=known.bytes_shipped,
            num_shipped=known.num_shipped,
            residual_s=known.residual_s,
            sp_degree=self.sp_degree,
            alive=self.is_alive,
            starting=self.info is None,
            draining=self.is_draining,
            pool=self.pool,
        )


@dataclass(slots=True, eq=False)
class Flight:
    """One request from submission to its last delta."""

    request_id: str  # as the client's side knows it
    request: GenerationRequest  # as the workers know it
    buffer: DeltaBuffer = field(default_factory=DeltaBuffer)
    decode: WorkerPeer | None = None
    prefill: WorkerPeer | None = None  # while it computes or ships the prompt; may be the one that decodes
    num_pending_tokens: int = 0  # that it is to compute
    transfers: bool = False  # its prompt is one that prefill workers are for
    digests: list[bytes] = field(default_factory=list)  # of the prompt's prefixes
    # What the client has; None: that sequence has ended.
    outputs: list[list[int] | None] = field(default_factory=list, repr=False)
    num_tries: int = 0  # that it was placed anew
    num_lost: int = 0  # decode workers that were lost under it
    lost_at: float = -math.inf  # when the last was

    @property
    def num_tokens(self) -> int:
        """Prompt tokens."""
        return len(self.request.prompt_token_ids)

    @property
    def has_output(self) -> bool:
        """Whether the client has a token, or knows of an end."""
        return any(tokens is None or tokens for tokens in self.outputs)

    def count_loss(self, now: float, *, was_silent: bool, window_s: float) -> None:
        """Another decode worker was lost. Those that fall silent within ``window_s`` are one loss: then it is the
        network that failed, and not this request that ends whoever has it.
        """
        self.num_lost += not (was_silent and now < self.lost_at + window_s)
        self.lost_at = now

    def try_again(self) -> None:
        """Ask for what the client has not got, under a new id: what workers still say of the last try is not this
        one's."""
        self.num_tries += 1
        outputs = tuple(tokens if tokens is None else tuple(tokens) for tokens in self.outputs)
        request_id = f"{self.request_id}#{self.num_tries}"
        self.request = replace(self.request, request_id=request_id, outputs=outputs if self.has_output else ())

    def to_client(self, deltas: list[OutputDelta]) -> list[OutputDelta]:
        """The workers' deltas under the client's id; they count as received."""
        for delta in deltas:
            tokens = self.outputs[delta.index]
            assert tokens is not None, f"{self.request_id} goes on after its end"
            tokens.extend(delta.token_ids)
            if delta.finish_reason is not None:
                self.outputs[delta.index] = None
        if self.num_tries == 0:
            return deltas
        return [replace(delta, request_id=self.request_id) for delta in deltas]


def make_flight(request: GenerationRequest) -> Flight:
    """A request that was submitted. It gets a seed if it has none: whoever goes on with it draws the same."""
    params = request.sampling
    if params.seed is None:
        request = replace(request, sampling=replace(params, seed=secrets.randbits(SEED_BITS)))
    digests = digest_prefix(request.prompt_token_ids, request.cache_salt)
    return Flight(request.request_id, request, digests=digests, outputs=[[] for _ in range(params.n)])


async def _within(timeout_s: float, answer: Awaitable[T], *, failure: str) -> T:
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError:
        raise WorkerSilentError(f"{failure} {timeout_s:g} s") from None
