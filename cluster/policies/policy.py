"""The interface of a routing policy. Shared by the router and by what simulates it: no clock, no I/O."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What is known of one worker when a request is placed."""

    name: str
    node_id: str
    pending_tokens: int  # prompt tokens placed there that would be computed before this prompt's last one
    num_requests: int  # placed there to be decoded, and not finished
    num_free_pages: int  # as last reported
    num_cached_tokens: int = 0  # of the prompt to be placed, probably in its prefix cache
    role: str = ""  # what it was started for: "prefill" or "decode"
    num_prompts: int = 0  # placed there to be computed that prefill workers are for
    max_pending_tokens: int = 1 << 62  # with more its queue is long

    @property
    def is_mixed(self) -> bool:
        """Whether it has work that it was not started for."""
        return self.num_prompts > 0 if self.role == "decode" else self.num_requests > 0

    def has_long_queue(self, num_tokens: int) -> bool:
        """Whether a prompt of ``num_tokens`` would make its queue too long; an idle worker takes any."""
        more = max(0, num_tokens - self.num_cached_tokens)
        return self.pending_tokens > 0 and self.pending_tokens + more > self.max_pending_tokens


class Policy(ABC):
    """Picks a prefill and a decode worker together, so that the transfer overlaps the prefill."""

    repurposes = False  # gives workers work that they were not started for

    @abstractmethod
    def choose(
        self, prefill: Sequence[WorkerLoad], decode: Sequence[WorkerLoad], *, num_tokens: int
    ) -> tuple[WorkerLoad | None, WorkerLoad]:
        """Workers for a prompt of ``num_tokens``.

        Args:
            prefill: that may compute it; all there are if the policy ``repurposes``. Empty: it is computed where it is
                decoded.
            decode: that may decode it and have not said that they are full; never empty.
            num_tokens: of the prompt.

        Returns:
            The worker that computes it, None if ``prefill`` is empty, and the one that decodes it. Twice the same: it
            is computed there and sent nowhere.
        """


def count_pending(prompts: Iterable[int], num_tokens: int) -> int:
    """Tokens that a worker computes before the last one of a new prompt of ``num_tokens``.

    First come, first served, but a worker gives prompts that are much shorter than the oldest half of its steps
    (``longctx/engine/scheduler.py``): of longer ones, only as many tokens are computed meanwhile.

    Args:
        prompts: tokens that each prompt there still needs.
        num_tokens: that the new one needs.
    """
    prompts = list(prompts)
    shorter = sum(tokens for tokens in prompts if tokens <= 2 * num_tokens)
    return shorter + min(sum(prompts) - shorter, shorter + num_tokens)


def choose_computer(prefill: Sequence[WorkerLoad], generator: WorkerLoad, *, num_tokens: int) -> WorkerLoad | None:
    """The worker with the fewest tokens to compute until this prompt is; None if there is none.

    Of equal queues, the one on the generator's node: its KV travels through shared memory; then the one that keeps the
    fewest requests that decode there waiting.
    """

    def cost(load: WorkerLoad) -> tuple[int, bool, int]:
        num_before = load.pending_tokens + num_tokens - load.num_cached_tokens
        return num_before, load.node_id != generator.node_id, load.num_requests

    return min(prefill, key=cost, default=None)


def choose_generator(decode: Sequence[WorkerLoad]) -> WorkerLoad:
    """The worker with the fewest requests; of equal ones the one with less KV to ship, then with more free pages."""
    return min(decode, key=lambda load: (load.num_requests, -load.num_cached_tokens, -load.num_free_pages))
