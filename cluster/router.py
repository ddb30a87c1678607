"""Places requests on prefill and decode workers, and brings their output back. A ``ServingBackend``; knows no Ray.

    client -> submit -> policy picks P and D -> D.admit: pages reserved, lease granted -> P.prefill(request, lease)
                 P computes, its transport fills D's pages, layer by layer
    client <- deltas <- one connection per worker, all requests together <- D

Prompts enter first come, first served, long ones and others apart; a prefill worker is given only so many tokens at a
time, so that leases do not wait in its queue. Under a policy that repurposes, any worker may be P or D, or both for one
request. Who dies or falls silent costs time, not text: for a lost P the decode worker computes the prompt, for a lost D
another one goes on behind the last token that the client has. (Over 300 lines: placing, leaving and following are one
state machine over the same fields; what concerns one worker or request alone is in ``peer.py``.)
"""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from cluster.config import ServeConfig
from cluster.delta_buffer import DeltaBuffer
from cluster.handle import Roster, WorkerHandle
from cluster.membership import Membership
from cluster.messages import Admission, WorkerReport
from cluster.peer import PREFILL_WINDOW, Flight, WorkerPeer, make_flight
from cluster.policies import POLICIES
from cluster.policies.policy import Policy, WorkerLoad
from cluster.serving import Health, NotReadyError, PromptTokenizer, QueueStats, ServedModel, WorkerStats
from cluster.waiting import WaitingRoom
from longctx.errors import LongctxError, QueueFullError, WorkerDrainedError, WorkerLostError, WorkerSilentError
from longctx.messages import GenerationRequest, OutputDelta

logger = logging.getLogger(__name__)

REJOIN_INTERVAL_S = 0.5  # between two attempts to reach a lost worker
FULL_WAIT_S = 0.05  # longest wait before a full worker is asked again
MAX_TRIES = 3  # decode workers that may be lost under one request
STOPPING = "the server is stopping"


class Router:
    """One deployment's router.

    Args:
        handles: its workers.
        config: the deployment's.
        model: how clients see it; its context is lowered to what the workers' pools hold.
        tokenizer: the model's.
        roster: says which workers there are now; None: ``handles``, always.
    """

    def __init__(
        self,
        handles: Sequence[WorkerHandle],
        config: ServeConfig,
        *,
        model: ServedModel,
        tokenizer: PromptTokenizer,
        roster: Roster | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._config = config
        self._policy: Policy = POLICIES.get(config.cluster.policy)()
        self._peers = Membership(handles, config, any_role=self._policy.repurposes)
        self._roster = roster
        self._flights: dict[str, Flight] = {}  # by the id that workers know
        self._waiting = WaitingRoom()
        self._lost_at = 0.0  # when a decode worker was lost last
        self._is_stopping = False
        self._change = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to follow the workers; they may still be loading."""
        for peer in self._peers:
            self._spawn(self._follow(peer))
        if self._roster is not None:
            self._watch(self._roster)

    async def stop(self) -> None:
        """End the requests in flight, placed or not; the workers go on."""
        self._is_stopping = True
        self._note_change()
        for flight in self._flights.values():
            flight.buffer.fail(NotReadyError(STOPPING))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for peer in self._peers:
            peer.hang_up()

    def check_queue(self) -> None:
        """See ``ServingBackend.check_queue``."""
        if len(self._waiting) >= self._config.engine.max_waiting:
            raise QueueFullError(f"{len(self._waiting)} requests are waiting already (engine.max_waiting)")

    async def submit(self, request: GenerationRequest) -> AsyncIterator[list[OutputDelta]]:
        """See ``ServingBackend.submit``."""
        self.check_queue()
        flight = self._flights[request.request_id] = make_flight(request)
        num_unfinished = request.sampling.n
        try:
            while num_unfinished:
                try:
                    if flight.decode is None:
                        await self._wait_for_place(flight)
                    deltas = await flight.buffer.take()
                except (WorkerLostError, WorkerDrainedError) as error:
                    self._retry(flight, error)
                    continue
                num_unfinished -= sum(delta.finish_reason is not None for delta in deltas)
                yield flight.to_client(deltas)
        finally:
            del self._flights[flight.request.request_id]
            self._leave(flight, cancels=num_unfinished > 0)

    def worker_of(self, request_id: str) -> str:
        """Name of the decode worker."""
        retried = (flight for flight in self._flights.values() if flight.request_id == request_id)
        flight = self._flights.get(request_id) or next(retried, None)
        return flight.decode.name if flight and flight.decode else ""

    async def health(self) -> Health:
        """See ``ServingBackend.health``."""
        return self._peers.health()

    async def worker_stats(self) -> list[WorkerStats]:
        """See ``ServingBackend.worker_stats``."""
        return self._peers.stats()

    def queue(self) -> QueueStats:
        """See ``ServingBackend.queue``."""
        return self._waiting.describe()

    # Placing

    async def _wait_for_place(self, flight: Flight) -> None:
        has_prefill = any(peer.role == "prefill" for peer in self._peers)
        is_long = flight.num_tokens > self._config.cluster.local_prefill_tokens
        transfers = flight.transfers = has_prefill and is_long and not flight.has_output
        if not flight.num_tries and not self._peers.has_decode:  # not behind others that wait for a worker to come back
            raise self._not_ready()
        window = PREFILL_WINDOW * self._config.engine_of("prefill" if transfers else "decode").max_batch_tokens
        turn = self._waiting.turn(flight, is_long=flight.num_tokens > window)
        with turn.join(flight):
            async with turn.lock:
                await self._wait_for_worker()
                turn.lacks = lacks = await self._try_place(flight, transfers=transfers)
                while lacks:
                    await self._wait_for_change()
                    await self._wait_for_worker()
                    lacks = await self._try_place(flight, transfers=transfers)
                    turn.lacks = lacks or turn.lacks  # until the next one has asked

    async def _wait_for_worker(self) -> None:
        """Until there is a decode worker, or the last has been gone for ``cluster.recovery_timeout_s``."""
        loop, timeout_s = asyncio.get_running_loop(), self._config.cluster.recovery_timeout_s
        while not self._peers.has_decode and not self._is_stopping and loop.time() < self._lost_at + timeout_s:
            await self._wait_for_change()

    async def _try_place(self, flight: Flight, *, transfers: bool) -> str:
        """Hand the request to the policy's choice, or its next one if that is full; which role lacks room, if any."""
        full: set[str] = set()
        while True:
            prefill, decode = self._choose(flight, transfers=transfers, full=full)
            if decode is None:
                return "decode"
            if prefill is not None and self._load(prefill, flight).has_long_queue(flight.num_tokens):
                return "prefill"
            admission = await self._admit(flight, None if prefill is decode else prefill, decode)
            if admission.kind != "full":
                break
            full.add(decode.name)
        if admission.kind == "local":
            self._expect_prompt(flight, decode)
        decode.expect(flight)
        if admission.kind == "leased":
            assert prefill is not None
            await self._prefill(flight, prefill, decode, admission)
        return ""

    async def _admit(self, flight: Flight, prefill: WorkerPeer | None, decode: WorkerPeer) -> Admission:
        """Ask a decode worker, which has the request from now on unless it is full."""
        transport = prefill.transport_to(decode) if prefill else None
        flight.decode, flight.buffer = decode, DeltaBuffer()  # its deltas may be here before its answer
        decode.num_requests += 1
        try:
            num_senders = prefill.sp_degree if prefill else 1
            waits = not flight.transfers  # one that somebody else might begin at once waits here, for whoever can
            admission: Admission = await self._call(decode, "admit", flight.request, transport, num_senders, waits)
        except BaseException:
            self._leave(flight, cancels=True)  # it may have been admitted all the same
            raise
        if admission.kind == "full":
            self._leave_decode(flight)
        return admission

    async def _prefill(self, flight: Flight, prefill: WorkerPeer, decode: WorkerPeer, admission: Admission) -> None:
        """Let a prefill worker fill the lease; if it cannot, the decode worker computes the prompt itself."""
        self._expect_prompt(flight, prefill)
        prefill.expect(flight)
        try:
            await self._call(prefill, "prefill", flight.request, admission.grants)
        except (LongctxError, TimeoutError) as error:
            self._expect_prompt(flight, decode)
            await self._call(decode, "compute_here", flight.request.request_id, str(error))

    def _expect_prompt(self, flight: Flight, peer: WorkerPeer) -> None:
        """From now on ``peer`` is to compute the prompt, and nobody else."""
        self._leave_prefill(flight)
        flight.prefill = peer
        flight.num_pending_tokens = peer.count_uncached(flight)
        peer.pending.append(flight.num_pending_tokens)
        peer.num_prompts += flight.transfers

    def _choose(
        self, flight: Flight, *, transfers: bool, full: set[str]
    ) -> tuple[WorkerPeer | None, WorkerPeer | None]:
        """Prefill worker, if one is to be used, and decode worker; None if all of these are ``full``."""
        if self._is_stopping or not self._peers.has_decode:
            raise self._not_ready()
        alive = {peer.name: peer for peer in self._peers if peer.is_open}
        loads = [self._load(peer, flight) for peer in alive.values()]
        any_role = self._policy.repurposes
        decode = [load for load in loads if (any_role or load.role == "decode") and load.name not in full]
        prefill = [load for load in loads if transfers and (any_role or load.role == "prefill")]
        if not decode:
            return None, None
        computer, generator = self._policy.choose(prefill, decode, num_tokens=flight.num_tokens)
        return alive[computer.name] if computer else None, alive[generator.name]

    def _load(self, peer: WorkerPeer, flight: Flight) -> WorkerLoad:
        batch_tokens = self._config.engine_of(peer.role).max_batch_tokens
        return peer.load(flight.digests, num_tokens=flight.num_tokens, batch_tokens=batch_tokens)

    def _not_ready(self) -> NotReadyError:
        lost = "; ".join(f"{peer.name}: {peer.health().reason}" for peer in self._peers.decoders)
        return NotReadyError(STOPPING if self._is_stopping else f"no decode worker is ready ({lost})")

    async def _wait_for_change(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(FULL_WAIT_S):
                await self._change.wait()

    def _note_change(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    # Leaving

    def _retry(self, flight: Flight, error: WorkerLostError | WorkerDrainedError) -> None:
        """A request's decode worker was lost, or drains: another goes on behind what the client has."""
        lost = flight.decode.name if flight.decode else "a worker"
        self._leave(flight, cancels=True)
        if isinstance(error, WorkerLostError):
            cluster, now = self._config.cluster, asyncio.get_running_loop().time()
            window_s = cluster.heartbeat_s + cluster.worker_timeout_s  # it takes so long to notice
            flight.count_loss(now, was_silent=isinstance(error, WorkerSilentError), window_s=window_s)
        if flight.num_lost >= MAX_TRIES:
            raise WorkerLostError(f"decode worker {lost} was lost, the last of {MAX_TRIES} that tried this request")
        del self._flights[flight.request.request_id]
        flight.try_again()
        self._flights[flight.request.request_id] = flight

    def _leave(self, flight: Flight, *, cancels: bool) -> None:
        peers = [flight.decode] if flight.prefill is flight.decode else [flight.prefill, flight.decode]
        self._leave_prefill(flight)
        self._leave_decode(flight)
        for peer in (peer for peer in peers if cancels and peer is not None):
            self._spawn(self._cancel_at(peer, flight.request.request_id))

    def _leave_prefill(self, flight: Flight) -> None:
        peer, flight.prefill = flight.prefill, None
        if peer is not None:
            peer.pending.remove(flight.num_pending_tokens)
            peer.num_prompts -= flight.transfers
            self._note_change()

    def _leave_decode(self, flight: Flight) -> None:
        peer, flight.decode = flight.decode, None
        if peer is not None:
            peer.num_requests -= 1
            self._note_change()

    async def _cancel_at(self, peer: WorkerPeer, request_id: str) -> None:
        with suppress(LongctxError, TimeoutError):  # a lost worker is reset before it is used again
            await self._call(peer, "cancel", request_id)

    # Following

    async def _follow(self, peer: WorkerPeer) -> None:
        """Poll one worker for as long as it is on the roster."""
        while peer in self._peers:
            try:
                info = await peer.join(self._config.cluster)
                logger.info("%s is ready (pid %d on %s)", peer.name, info.pid, info.host)
                self.model = dataclasses.replace(self.model, max_context=min(self.model.max_context, info.max_context))
                self._note_change()
                while peer.is_alive:
                    report = await peer.poll(self._config.cluster)
                    if peer.is_alive:  # nobody else noticed meanwhile that it is not
                        self._take(peer, report)
            except Exception as error:  # noqa: BLE001 - whatever it is, this worker cannot be used, and the reason is shown
                self._lose(peer, error)
            await asyncio.sleep(REJOIN_INTERVAL_S)

    def _lose(self, peer: WorkerPeer, error: Exception) -> None:
        reason = str(error) or type(error).__name__
        if not peer.is_alive:
            peer.reason = reason
            return
        logger.log(logging.INFO if peer.is_draining else logging.ERROR, "%s is lost: %s", peer.name, reason)
        peer.lose(reason, is_silent=isinstance(error, WorkerSilentError))
        if peer in self._peers.decoders:
            self._lost_at = asyncio.get_running_loop().time()
        for flight in list(self._flights.values()):
            if flight.decode is peer:
                flight.buffer.fail(peer.loss())
            elif flight.prefill is peer:
                self._recover(flight, f"{peer.name} is lost")
        if peer.is_silent and not peer.is_draining:
            self._spawn(peer.end_if_silent(self._config.cluster.frozen_timeout_s))
        self._note_change()

    def _recover(self, flight: Flight, reason: str) -> None:
        """The prefill worker cannot: the decode worker computes the prompt itself."""
        if flight.decode is None:
            self._leave_prefill(flight)
        else:
            self._expect_prompt(flight, flight.decode)
            self._spawn(self._compute_at(flight.decode, flight.request.request_id, reason))

    async def _compute_at(self, decode: WorkerPeer, request_id: str, reason: str) -> None:
        with suppress(LongctxError, TimeoutError):  # a lost one's requests are tried elsewhere
            await self._call(decode, "compute_here", request_id, reason)

    def _watch(self, roster: Roster) -> None:
        self._spawn(self._peers.watch(roster, lambda peer: self._spawn(self._follow(peer))))

    def _drain(self, peer: WorkerPeer, *, is_draining: bool) -> None:
        """It takes nothing new; what it has may stay for a while."""
        logger.info("%s %s", peer.name, "drains" if is_draining else "takes requests again")
        peer.is_draining = is_draining
        if is_draining:
            timeout_s = self._config.cluster.drain_timeout_s
            asyncio.get_running_loop().call_later(timeout_s, self._move_on, peer)
        self._note_change()

    def _move_on(self, peer: WorkerPeer) -> None:
        is_alone = not self._peers.has_decode  # then what it has stays with it
        for flight in [] if is_alone or not peer.is_draining else list(self._flights.values()):
            if flight.decode is peer:
                flight.buffer.fail(WorkerDrainedError(f"{peer.name} drains"))

    def _take(self, peer: WorkerPeer, report: WorkerReport) -> None:
        if report.is_draining != peer.is_draining:
            self._drain(peer, is_draining=report.is_draining)
        if report.stats is not None:
            peer.stats = report.stats
        for request_id, reason in report.finished:
            flight = self._flights.get(request_id)
            if flight is not None and flight.prefill is peer and flight.decode is not peer:
                if reason:
                    self._recover(flight, reason)
                else:
                    self._leave_prefill(flight)
        unknown: set[str] = set()
        for delta in report.deltas:
            flight = self._flights.get(delta.request_id)
            if flight is not None and flight.decode is peer:
                if flight.prefill is peer:  # the prompt is computed
                    self._leave_prefill(flight)
                flight.buffer.put((delta,))
            elif delta.finish_reason is None:
                unknown.add(delta.request_id)
        for request_id in unknown:
            self._spawn(self._cancel_at(peer, request_id))

    async def _call(self, peer: WorkerPeer, method: str, *args: object):
        """See ``WorkerPeer.call``; a worker that cannot be reached is lost at once, not when its poll notices."""
        if not peer.is_alive:
            raise peer.loss()
        try:
            return await peer.call(method, *args)
        except WorkerLostError as error:
            self._lose(peer, error)
            raise

    def _spawn(self, coroutine) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
