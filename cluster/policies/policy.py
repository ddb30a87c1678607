"""The interface of a routing policy."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What is known of one worker when a request is placed."""

    name: str
    node_id: str
    pending_tokens: int  # prompt tokens placed there and not yet computed
    num_requests: int  # placed there and not finished
    num_free_pages: int  # as last reported
    num_cached_tokens: int = 0  # of the prompt to be placed, probably in its prefix cache


class Policy(ABC):
    """Picks a prefill and a decode worker together, so that the transfer overlaps the prefill."""

    @abstractmethod
    def choose(
        self, prefill: Sequence[WorkerLoad], decode: Sequence[WorkerLoad], *, num_tokens: int
    ) -> tuple[WorkerLoad | None, WorkerLoad]:
        """Workers for a prompt of ``num_tokens``; no prefill worker if ``prefill`` is empty; ``decode`` never is."""
