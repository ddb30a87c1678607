"""TokenRing (arXiv 2412.20501): KV stays, Q walks the ring, partial outputs go straight home.

A rank's own queries on its own keys need no link: half of their heads are computed while the first hop is on its way,
the other half while the last partial outputs are. Q walks towards lower ranks: in a causal zigzag layout a host below
the owner needs the whole Q for half of its keys, and after the wrap-around only the late half of Q, which is all that
then travels.
"""

from parallel.plan import Plan, PlanBuilder, Problem


def plan_token_ring(problem: Problem) -> Plan:
    """In step s, rank r hosts the queries of rank r + s; in step W it computes the rest of its own."""
    builder, world_size = PlanBuilder("token_ring", problem), problem.world_size
    first, second = problem.split_heads_in_two()
    for owner in range(world_size):
        builder.compute(owner, owner, rank=owner, step=0, heads=first)
        builder.compute(owner, owner, rank=owner, step=world_size if world_size > 1 else 0, heads=second)
        for step in range(world_size):
            host = (owner - step) % world_size
            if step:
                builder.compute(owner, host, rank=host, step=step)
            if step + 1 < world_size:
                builder.hop("q", owner, source=host, destination=(host - 1) % world_size, step=step)
    return builder.finish()
