"""Join the shortest queue (Splitwise, Patel et al., 2023, section IV), between workers that keep their roles.

Prefill workers by the tokens to be computed until this prompt is; decode workers by requests, then by KV that need not
be shipped, then by free pages.
"""

from collections.abc import Sequence

from cluster.policies.policy import Policy, WorkerLoad, choose_computer, choose_generator


class ShortestQueue(Policy):
    """Splitwise's cluster scheduler without its mixed pool."""

    def choose(
        self, prefill: Sequence[WorkerLoad], decode: Sequence[WorkerLoad], *, num_tokens: int
    ) -> tuple[WorkerLoad | None, WorkerLoad]:
        generator = choose_generator(decode)
        return choose_computer(prefill, generator, num_tokens=num_tokens), generator
