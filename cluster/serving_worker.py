"""A worker: it computes prompts for others, generates, or does both, as its role and the policy want.

Its role says what it was started for. Under a policy that gives workers other work than that, each of them can do
everything, and what one does is the router's to say, request by request: nothing has to be started or drained.
"""

from collections.abc import Sequence
from dataclasses import replace

from cluster.decode_side import DecodeSide
from cluster.messages import Admission
from cluster.prefill_side import PrefillSide
from cluster.serving import WorkerStats
from cluster.shipping import choose_sending_pool, receives, sends
from cluster.worker import Worker
from longctx.engine.build import MakePool
from longctx.errors import LongctxError
from longctx.messages import GenerationRequest
from memory.messages import LeaseGrant


class ServingWorker(Worker):
    """See ``Worker``; ``role`` is ``"prefill"`` or ``"decode"``."""

    _prefill: PrefillSide | None = None  # until ``start``, and for a role that sends nothing
    _decode: DecodeSide | None = None

    @property
    def prefill_side(self) -> PrefillSide:
        """What computes prompts for others; there is none before ``start``, and for some roles none at all."""
        assert self._prefill is not None
        return self._prefill

    @property
    def decode_side(self) -> DecodeSide:
        """What generates; there is none before ``start``."""
        assert self._decode is not None
        return self._decode

    async def transports(self) -> tuple[str, ...]:
        """Transports that this worker can send with."""
        return tuple(self._prefill.senders) if self._prefill else ()

    async def prefill(self, request: GenerationRequest, grants: Sequence[LeaseGrant]) -> None:
        """See ``PrefillSide.prefill``."""
        if self._is_draining:
            raise LongctxError(f"{self.name} is draining")
        await self.prefill_side.prefill(request, grants)

    async def admit(
        self, request: GenerationRequest, transport: str | None, num_senders: int = 1, waits: bool = True
    ) -> Admission:
        """See ``DecodeSide.admit``."""
        if self._is_draining:
            return Admission("full")
        return await self.decode_side.admit(request, transport, num_senders, waits=waits)

    async def compute_here(self, request_id: str, reason: str) -> None:
        """See ``DecodeSide.compute_here``."""
        await self.decode_side.compute_here(request_id, reason)

    def _make_pool(self) -> MakePool | None:
        if not sends(self.config.cluster, self.role):
            return None  # a receiver takes any memory
        return choose_sending_pool(self.config.transport)

    def _open(self) -> None:
        cluster = self.config.cluster
        self._prefill = PrefillSide(self) if sends(cluster, self.role) else None
        self._decode = DecodeSide(self, receives=receives(cluster, self.role))

    def _shut(self) -> None:
        for side in (self._prefill, self._decode):
            if side is not None:
                side.close()

    def _cancel(self, request_id: str) -> None:
        self.decode_side.cancel(request_id)

    def _reset(self) -> None:
        self.decode_side.reset()
        self.engine.fail_all("a new router began", "abort")

    def _take_arrival(self, rank: int, request_id: str, payload: bytes | None, reason: str) -> None:
        self.decode_side.take_arrival(rank, request_id, payload, reason)

    def _describe_transport(self, stats: WorkerStats) -> WorkerStats:
        if self._prefill is None:
            return replace(stats, transport="+".join(sorted(self.decode_side.receivers)))
        return replace(
            stats,
            transport="+".join(sorted(self._prefill.senders)),
            bytes_shipped=stats.bytes_shipped + sum(each.bytes_shipped for each in self._prefill.senders.values()),
            num_shipped=self._prefill.num_shipped,
            residual_s=self._prefill.residual_s,
        )
