"""Splitwise's cluster scheduler with its mixed pool (Patel et al., 2023, section IV-A).

Workers are in the pool that they were started for, prompt or token, until they get work of the other kind; then they
are in the mixed pool, and go home once that work is done. So which pool a worker is in follows from what it has to do,
and nothing has to be drained or remembered. A prompt goes to the shortest queue of the prompt pool; if that is long, to
the mixed pool; if those are long, too, a worker of the token pool takes it. Tokens likewise: to the token pool; if all
of it is full, to the mixed pool; then a worker of the prompt pool takes them. If there is nobody left to take, prompts
join the shortest queue of all.
"""

from collections.abc import Iterator, Sequence

from cluster.policies.policy import Policy, WorkerLoad, choose_computer, choose_generator


class Splitwise(Policy):
    """Prompt, token and mixed pools."""

    repurposes = True

    def choose(
        self, prefill: Sequence[WorkerLoad], decode: Sequence[WorkerLoad], *, num_tokens: int
    ) -> tuple[WorkerLoad | None, WorkerLoad]:
        generator = choose_generator(next(_pools(decode, home="decode")))
        for pool in _pools(prefill, home="prefill"):
            short = [load for load in pool if not load.has_long_queue(num_tokens)]
            if short:
                return choose_computer(short, generator, num_tokens=num_tokens), generator
        return choose_computer(prefill, generator, num_tokens=num_tokens), generator


def _pools(loads: Sequence[WorkerLoad], *, home: str) -> Iterator[list[WorkerLoad]]:
    """The workers by pool, in the order in which they are asked; pools without any are left out."""
    at_home = [load for load in loads if load.role == home and not load.is_mixed]
    if at_home:
        yield at_home
    mixed = [load for load in loads if load.is_mixed]
    if mixed:
        yield mixed
    away = [load for load in loads if load.role != home and not load.is_mixed]
    if away:
        yield away
