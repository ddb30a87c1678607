"""TokenRing (arXiv 2412.20501): KV stays, Q walks the ring, partial outputs go straight home.

A rank's own queries on its own keys need no link: half of their heads are computed while the first hop is on its way,
the other half while the last partial outputs are. The last hop's queries are computed in two halves too, so that the
first half's outputs travel while the second is computed. Q walks towards lower ranks: in a causal zigzag layout a host
below the owner needs the whole Q for half of its keys, and after the wrap-around only the late half of Q, which is all
that then travels.
"""

from parallel.plan import Plan, PlanBuilder, Problem


def plan_token_ring(problem: Problem) -> Plan:
    """In step s, rank r hosts the queries of rank r + s; after the last hop it computes the rest of its own."""
    builder, last = PlanBuilder("token_ring", problem), problem.world_size - 1
    first, second = problem.split_heads_in_two()
    for owner in range(problem.world_size):
        builder.compute(owner, owner, rank=owner, step=0, heads=first)
        builder.compute(owner, owner, rank=owner, step=last + 2 if last else 0, heads=second)
        for step in range(1, last + 1):
            host, before = (owner - step) % problem.world_size, (owner - step + 1) % problem.world_size
            for heads in (first, second):
                builder.hop("q", owner, source=before, destination=host, step=step - 1, heads=heads)
            builder.compute(owner, host, rank=host, step=step, heads=first)
            builder.compute(owner, host, rank=host, step=step + (step == last), heads=second)
    return builder.finish()
