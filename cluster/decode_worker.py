"""Generates: takes KV in from prefill workers, or computes a prompt itself where that is cheaper or nobody else can.

A transfer that fails is not the client's business: its pages are fenced, given back, and the prompt is computed here.
"""

import logging

from cluster.first_tokens import decode_first_tokens
from cluster.messages import Admission
from cluster.worker import Worker
from longctx.engine.build import MakePool
from longctx.engine.engine import Engine
from longctx.errors import LongctxError, WorkerLostError
from longctx.messages import GenerationRequest, OutputDelta
from memory.transport import TRANSPORTS, KVReceiver

logger = logging.getLogger(__name__)


class DecodeWorker(Worker):
    """One engine that generates."""

    role = "decode"

    def _make_pool(self) -> MakePool | None:
        return None  # it only receives: any memory will do

    def _open(self, engine: Engine) -> None:
        self._arriving: dict[str, GenerationRequest] = {}  # prompts whose KV is on its way
        self._receivers: dict[str, KVReceiver] = {}
        if self.config.cluster.num_prefill_workers == 0:
            return
        wanted = TRANSPORTS if self.config.transport.name == "auto" else (self.config.transport.name,)
        for name in wanted:
            self._receivers[name] = TRANSPORTS.get(name).make_receiver(
                engine.pool,
                self.config.transport,
                on_commit=lambda request_id, payload: self._from_transport(self._commit, request_id, payload),
                on_failed=lambda request_id, reason: self._from_transport(self._compute_here, request_id, reason),
            )

    async def admit(self, request: GenerationRequest, transport: str | None) -> Admission:
        """Reserve pages for a prompt that a prefill worker will send over ``transport``; None: compute it here.

        Raises ``RequestError`` or ``QueueFullError``.
        """
        return await self.on_engine(self._admit, request, transport)

    async def compute_here(self, request_id: str, reason: str) -> None:
        """The prefill worker is lost or refused: take the lease back and compute the prompt here."""
        await self.on_engine(self._compute_here, request_id, reason)

    def _admit(self, request: GenerationRequest, transport: str | None) -> Admission:
        if transport is None:
            self.engine.add(request)
            return Admission("local")
        reservation = self.engine.reserve(request)
        if reservation is None:
            return Admission("full")
        num_uncached = len(request.prompt_token_ids) - reservation.num_cached_tokens
        if num_uncached <= self.config.cluster.local_prefill_tokens:
            self.engine.release_reservation(request.request_id)
            self.engine.add(request)
            return Admission("local")
        first, num_pages = reservation.first_page_idx, len(reservation.pages)
        try:
            grant = self._receivers[transport].grant(
                request.request_id,
                reservation.pages,
                page_idxs=range(first, first + num_pages),
                num_tokens=len(request.prompt_token_ids),
            )
        except BaseException:
            self.engine.release_reservation(request.request_id)
            raise
        self._arriving[request.request_id] = request
        return Admission("leased", grant)

    def _from_transport(self, function, request_id: str, detail: str | bytes) -> None:
        """On a thread of the transport: hand over to the engine's."""
        try:
            self.engine_loop.call(function, request_id, detail)
        except (WorkerLostError, RuntimeError):  # closing: nobody waits any more
            logger.debug("%s: %s came after the end", self.name, request_id)

    def _commit(self, request_id: str, payload: bytes) -> None:
        request = self._arriving.pop(request_id, None)
        if request is None:  # cancelled meanwhile
            return
        try:
            self.post(self.engine.attach(request_id, decode_first_tokens(payload)))
        except (ValueError, LongctxError) as error:
            self._arriving[request_id] = request
            self._compute_here(request_id, str(error))

    def _compute_here(self, request_id: str, reason: str) -> None:
        request = self._arriving.pop(request_id, None)
        if request is None:
            return
        logger.warning("%s: KV of %s did not arrive (%s); computing the prompt here", self.name, request_id, reason)
        self._give_up_lease(request_id)
        try:
            self.engine.add(request)
        except LongctxError as error:
            self.post(
                OutputDelta(request_id, index, (), "", finish_reason="error", error=str(error))
                for index in range(request.sampling.n)
            )

    def _give_up_lease(self, request_id: str) -> None:
        """Pages are given back only once no sender can write them any more."""
        for receiver in self._receivers.values():
            receiver.revoke(request_id)
        self.engine.release_reservation(request_id)

    def _cancel(self, request_id: str) -> None:
        if self._arriving.pop(request_id, None) is not None:
            self._give_up_lease(request_id)
        self.engine.cancel(request_id)

    def _reset(self) -> None:
        for request_id in list(self._arriving):
            self._cancel(request_id)
        self.engine.fail_all("a new router began", "abort")

    def _shut(self) -> None:
        for receiver in self._receivers.values():
            receiver.close()

    def _describe_transport(self) -> tuple[str, int]:
        return "+".join(sorted(self._receivers)), 0
