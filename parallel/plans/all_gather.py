"""Everyone gets all the KV it needs, then computes: no overlap, but one large attention."""

from parallel.plan import Plan, PlanBuilder, Problem


def plan_all_gather(problem: Problem) -> Plan:
    """Everything is sent in step 0 and computed in step 1."""
    builder, world_size = PlanBuilder("all_gather", problem), problem.world_size
    for owner in range(world_size):
        for host in range(world_size):
            builder.compute(host, owner, rank=host, step=min(1, world_size - 1))
            builder.hop("kv", owner, source=owner, destination=host, step=0)
    return builder.finish()
