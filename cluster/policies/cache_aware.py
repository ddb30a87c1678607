"""Longest cached prefix against load, as SGLang's router weighs them (Zheng et al., 2024): a conversation comes back to
the decode worker that has its KV, unless that one has so many more requests than the others that it is better moved.
"""

from collections.abc import Sequence

from cluster.policies.policy import Policy, WorkerLoad, choose_computer, choose_generator

MIN_SHARE = 0.5  # of the prompt that has to be cached for a worker to be preferred
MORE_REQUESTS, TIMES_REQUESTS = 4, 1.5  # than the least busy one has: busier than both together, it is passed over


class CacheAware(Policy):
    """Between workers that keep their roles."""

    def choose(
        self, prefill: Sequence[WorkerLoad], decode: Sequence[WorkerLoad], *, num_tokens: int
    ) -> tuple[WorkerLoad | None, WorkerLoad]:
        fewest = min(load.num_requests for load in decode)
        most = max(fewest + MORE_REQUESTS, fewest * TIMES_REQUESTS)
        near = [
            load
            for load in decode
            if load.num_requests <= most and load.num_cached_tokens >= max(1, MIN_SHARE * num_tokens)
        ]
        longest = max((load.num_cached_tokens for load in near), default=0)
        generator = choose_generator([load for load in near if load.num_cached_tokens == longest] or decode)
        return choose_computer(prefill, generator, num_tokens=num_tokens), generator
