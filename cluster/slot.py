"""What one HTTP request holds of the server's places and uses of its tenant's limits."""

from collections.abc import Sequence

from starlette.types import Scope

from cluster.openai_errors import busy
from cluster.rate_limit import Places, Tenant
from longctx.messages import GenerationRequest

TENANT = "tenant"  # in the scope's state


class Slot:
    """One request's share, from before its body is read to its end. A prompt of many is a request here.

    Args:
        places: the server's.
        tenant: who asks.
    """

    def __init__(self, places: Places, tenant: Tenant) -> None:
        self._places, self._tenant = places, tenant
        self._num_held = 0
        self._is_begun = False  # it is generated
        self._num_prompt_tokens = self._num_charged = self._num_generated = 0

    def take(self, count: int) -> None:
        """Hold ``count`` more places, or raise ``ApiError`` 429 and hold what was held."""
        places = self._places
        if not places.has_room(count, own=self._num_held):
            why = "max_requests" if places.limit == places.most else "slo_ttft_s and server.slo_tpot_s"
            raise busy(
                f"{places.num_held} requests are served or waiting; {places.limit} may be (server.{why})",
                retry_after_s=places.retry_after_s(places.num_held + count - places.limit),
            )
        self._tenant.take_requests(count)
        places.take(count)
        self._num_held += count

    def charge(self, requests: Sequence[GenerationRequest], *, max_context: int) -> None:
        """Use the tokens of requests that are to be generated; raises as ``Tenant.take_tokens``."""
        self._num_charged = self._tenant.take_tokens(requests, max_context=max_context)
        self._num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self._is_begun = True

    def settle(self, num_generated: int) -> None:
        """No more tokens than these will come: give back the others that were asked for."""
        self._num_generated = num_generated
        self._recharge(self._num_prompt_tokens + num_generated)

    def give_back(self, *, is_refused: bool = False) -> None:
        """The request has ended. One that was refused before it had a token costs nothing. Idempotent."""
        is_free = is_refused and not self._num_generated
        if is_free:
            self._recharge(0)
            self._tenant.give_back_requests(self._num_held)
        is_end = self._is_begun and not is_free
        self._tenant.places.give_back(self._num_held, is_end=is_end)
        self._places.give_back(self._num_held, is_end=is_end)
        self._num_held = 0

    def _recharge(self, amount: int) -> None:
        if self._tenant.tokens is not None and self._is_begun:
            self._tenant.tokens.take(amount - self._num_charged)
            self._num_charged = amount


def tenant_of(scope: Scope) -> Tenant:
    """Who asks, as ``KeyCheck`` found out."""
    return scope["state"][TENANT]
