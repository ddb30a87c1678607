"""Generates: takes KV in from prefill workers, or computes a prompt itself where that is cheaper or nobody else can.

A transfer that fails is not the client's business: its pages are fenced, given back, and the prompt is computed here.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.first_tokens import decode_first_tokens
from cluster.messages import Admission
from cluster.shipping import open_receivers
from cluster.worker import Worker
from longctx.engine.export import Reservation
from longctx.errors import LongctxError, WorkerLostError
from longctx.messages import GenerationRequest, OutputDelta
from longctx.shards.exports import OwnPages
from memory.messages import LeaseGrant
from memory.transport import KVReceiver

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Arrival:
    """A prompt whose KV is on its way."""

    request: GenerationRequest
    missing: set[int]  # ranks whose part has not arrived


class DecodeSide:
    """What a worker does to generate. Made once the worker's engine is there.

    Args:
        worker: whose engine generates.
        receives: prompts may come from others.
    """

    def __init__(self, worker: Worker, *, receives: bool) -> None:
        self._worker = worker
        self._arriving: dict[str, _Arrival] = {}
        self.receivers: dict[str, KVReceiver] = {}
        if receives:
            self.receivers = open_receivers(
                worker.engine.shipped_pool,
                worker.config.transport,
                on_commit=lambda request_id, payload: self._from_transport(self._arrive, request_id, 0, payload),
                on_failed=lambda request_id, reason: self._from_transport(self._compute_here, request_id, reason),
            )

    async def admit(
        self, request: GenerationRequest, transport: str | None, num_senders: int = 1, *, waits: bool = True
    ) -> Admission:
        """Reserve pages for a prompt that a prefill worker's ``num_senders`` ranks will send over ``transport``.

        None: compute it here; with ``waits`` once there is room for it. Raises ``RequestError`` or ``QueueFullError``.
        """
        reserved = await self._worker.on_engine(self._reserve, request, transport, waits)
        if isinstance(reserved, Admission):
            return reserved
        assert transport is not None
        try:
            grants = await self._grant(request, transport, reserved, num_senders)
        except BaseException:
            await self._worker.cancel(request.request_id)
            raise
        if request.request_id not in self._arriving:  # cancelled meanwhile
            await self._revoke(request.request_id)
            raise LongctxError(f"request {request.request_id!r} was cancelled")
        return Admission("leased", grants)

    async def compute_here(self, request_id: str, reason: str) -> None:
        """The prefill worker is lost or refused: take the lease back and compute the prompt here."""
        await self._worker.on_engine(self._compute_here, request_id, reason)

    def _reserve(self, request: GenerationRequest, transport: str | None, waits: bool) -> Admission | Reservation:
        if transport is None:
            if not waits and not self._worker.engine.has_room(request):
                return Admission("full")
            self._worker.engine.add(request)
            return Admission("local")
        reservation = self._worker.engine.reserve(request)
        if reservation is None:
            return Admission("full")
        num_uncached = len(request.prompt_token_ids) - reservation.num_cached_tokens
        if num_uncached <= self._worker.config.cluster.local_prefill_tokens:
            self._worker.engine.release_reservation(request.request_id)
            self._worker.engine.add(request)
            return Admission("local")
        ranks = range(self._worker.ranks.sp_degree)
        self._arriving[request.request_id] = _Arrival(request, {r for r in ranks if self._select(r, reservation)[1]})
        return reservation

    def _select(self, rank: int, reservation: Reservation) -> tuple[list[int], list[int]]:
        """A rank's part of the reserved pages: indices in the sequence, and its own numbers."""
        own = OwnPages(rank, self._worker.engine.shipped_pool.num_pages)
        return own.select(reservation.first_page_idx, reservation.pages)

    async def _grant(
        self, request: GenerationRequest, transport: str, reservation: Reservation, num_senders: int
    ) -> tuple[LeaseGrant, ...]:
        """A lease on each rank that has pages for the prompt."""
        request_id, num_tokens = request.request_id, len(request.prompt_token_ids)
        page_idxs, pages = self._select(0, reservation)
        grants = []
        if pages:
            receiver = self.receivers[transport]
            grants.append(
                receiver.grant(request_id, pages, page_idxs=page_idxs, num_tokens=num_tokens, num_senders=num_senders)
            )
        for rank in range(1, self._worker.ranks.sp_degree):
            page_idxs, pages = self._select(rank, reservation)
            if pages:
                arguments = (transport, request_id, pages, page_idxs, num_tokens, num_senders)
                grants.append(await self._worker.ranks.call_one(rank, "grant", *arguments))
        return tuple(grants)

    def _from_transport(self, function: Callable[..., None], request_id: str, *details: Any) -> None:
        """On a thread that is not the engine's: hand over to that."""
        try:
            self._worker.engine_loop.call(function, request_id, *details)
        except (WorkerLostError, RuntimeError):  # closing: nobody waits any more
            logger.debug("%s: %s came after the end", self._worker.name, request_id)

    def take_arrival(self, rank: int, request_id: str, payload: bytes | None, reason: str) -> None:
        """A lease on another rank's pages has ended: committed, or failed for a reason."""
        if payload is None:
            self._from_transport(self._compute_here, request_id, reason)
        else:
            self._from_transport(self._arrive, request_id, rank, payload)

    def _arrive(self, request_id: str, rank: int, payload: bytes) -> None:
        """A rank has its part of a prompt's KV; once all have, the first tokens are sampled already."""
        arrival = self._arriving.get(request_id)
        if arrival is None:  # cancelled meanwhile
            return
        arrival.missing.discard(rank)
        if arrival.missing:
            return
        del self._arriving[request_id]
        try:
            self._worker.post(self._worker.engine.attach(request_id, decode_first_tokens(payload)))
        except (ValueError, LongctxError) as error:
            self._arriving[request_id] = arrival
            self._compute_here(request_id, str(error))

    def _compute_here(self, request_id: str, reason: str) -> None:
        arrival = self._arriving.pop(request_id, None)
        if arrival is None:
            return
        logger.warning(
            "%s: KV of %s did not arrive (%s); computing the prompt here", self._worker.name, request_id, reason
        )
        self._give_up_lease(request_id, partial(self._start_over, arrival.request))

    def _start_over(self, request: GenerationRequest) -> None:
        self._worker.engine.release_reservation(request.request_id)
        try:
            self._worker.engine.add(request)
        except LongctxError as error:
            self._worker.post(
                OutputDelta(request.request_id, index, (), "", finish_reason="error", error=str(error))
                for index in range(request.sampling.n)
            )

    def _give_up_lease(self, request_id: str, go_on: Callable[[], None]) -> None:
        """Pages are given back, by ``go_on`` on the engine's thread, only once no sender can write them any more."""
        for receiver in self.receivers.values():
            receiver.revoke(request_id)
        if not self._worker.ranks:
            go_on()
            return

        async def revoke() -> None:
            with suppress(LongctxError, TimeoutError):  # a rank that does not answer is lost, and with it all pages
                await self._revoke(request_id)
                await self._worker.on_engine(go_on)

        self._worker.from_other_thread(revoke)

    async def _revoke(self, request_id: str) -> None:
        for receiver in self.receivers.values():
            receiver.revoke(request_id)
        if self._worker.ranks:
            await self._worker.ranks.call_all("revoke", request_id)

    def cancel(self, request_id: str) -> None:
        """End a request, whatever it waits for; on the engine's thread."""
        if self._arriving.pop(request_id, None) is None:
            self._worker.engine.cancel(request_id)
        else:
            self._give_up_lease(request_id, partial(self._worker.engine.cancel, request_id))

    def reset(self) -> None:
        """End everything that is on its way; on the engine's thread."""
        for request_id in list(self._arriving):
            self.cancel(request_id)

    def close(self) -> None:
        """The engine has stopped: nothing arrives any more."""
        for receiver in self.receivers.values():
            receiver.close()
