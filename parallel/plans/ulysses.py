"""DeepSpeed Ulysses (arXiv 2309.14509): every rank computes some heads over the whole sequence.

Heads need not divide by the ranks: shares differ by one head, and a KV head goes to every rank that holds one of its
query heads. Ranks beyond the number of heads only give and take.
"""

from parallel.plan import Plan, PlanBuilder, Problem


def plan_ulysses(problem: Problem) -> Plan:
    """Queries and keys are exchanged in step 0 and computed in step 1; outputs go home."""
    builder, world_size = PlanBuilder("ulysses", problem), problem.world_size
    for rank in range(world_size):
        heads = share_of_heads(problem.num_heads, rank, world_size)
        for owner in range(world_size):
            for kind in ("q", "kv"):
                builder.hop(kind, owner, source=owner, destination=rank, step=0, heads=heads)
            for kv_owner in range(world_size):
                builder.compute(owner, kv_owner, rank=rank, step=min(1, world_size - 1), heads=heads)
    return builder.finish()


def share_of_heads(num_heads: int, index: int, count: int) -> tuple[int, int]:
    """The ``index``-th of ``count`` ranges of heads."""
    return num_heads * index // count, num_heads * (index + 1) // count
