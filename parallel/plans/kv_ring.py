"""Ring Attention (arXiv 2310.01889): Q stays, KV walks the ring.

KV walks towards lower ranks: in a causal zigzag layout those below the owner need all of its keys, those reached
after the wrap-around only the early half.
"""

from parallel.plan import Plan, PlanBuilder, Problem


def plan_kv_ring(problem: Problem) -> Plan:
    """In step s, rank r hosts the keys of rank r + s."""
    builder, world_size = PlanBuilder("kv_ring", problem), problem.world_size
    for owner in range(world_size):
        for step in range(world_size):
            host = (owner - step) % world_size
            builder.compute(host, owner, rank=host, step=step)
            if step + 1 < world_size:
                builder.hop("kv", owner, source=host, destination=(host - 1) % world_size, step=step)
    return builder.finish()
