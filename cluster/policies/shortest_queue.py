"""Join the shortest queue (Splitwise, Patel et al., 2023, section IV).

Prefill workers by the tokens to be computed until this prompt is; decode workers by requests, then by KV that need not
be shipped, then by free pages.
"""

from collections.abc import Sequence

from cluster.policies.policy import Policy, WorkerLoad


class ShortestQueue(Policy):
    """Splitwise's cluster scheduler without its mixed pool."""

    def choose(
        self, prefill: Sequence[WorkerLoad], decode: Sequence[WorkerLoad], *, num_tokens: int
    ) -> tuple[WorkerLoad | None, WorkerLoad]:
        generator = min(decode, key=lambda load: (load.num_requests, -load.num_cached_tokens, -load.num_free_pages))

        def cost(load: WorkerLoad) -> tuple[int, bool]:
            # Of equal queues, the one on the generator's node: its KV travels through shared memory.
            return load.pending_tokens + num_tokens - load.num_cached_tokens, load.node_id != generator.node_id

        return min(prefill, key=cost, default=None), generator
