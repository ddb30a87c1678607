"""KV goes from its owner straight to everyone who needs it, on all links at once: for full meshes."""

from parallel.plan import Plan, PlanBuilder, Problem


def plan_kv_direct(problem: Problem) -> Plan:
    """Everything is sent in step 0; rank r computes with the keys of rank r + s in step s."""
    builder, world_size = PlanBuilder("kv_direct", problem), problem.world_size
    for owner in range(world_size):
        for step in range(world_size):
            host = (owner - step) % world_size
            builder.compute(host, owner, rank=host, step=step)
            builder.hop("kv", owner, source=owner, destination=host, step=0)
    return builder.finish()
