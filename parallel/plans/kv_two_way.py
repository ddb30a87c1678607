"""KV walks the ring both ways at once, using both directions of duplex links.

Each rank's KV goes half-way round in each direction. With an even number of ranks the rank opposite is half-way both
ways: then half of the KV heads take the whole ring in one direction and the other half in the other, which loads
every link alike. A single KV head cannot be split; its owners take turns in which way they serve the rank opposite.
"""

from parallel.plan import Heads, Plan, PlanBuilder, Problem


def plan_kv_two_way(problem: Problem) -> Plan:
    """In step s, rank r hosts keys of ranks r + s and r - s."""
    builder, world_size = PlanBuilder("kv_two_way", problem), problem.world_size
    if world_size % 2 == 0 and problem.num_kv_heads > 1:
        first, second = problem.split_heads_in_two()
        for owner in range(world_size):
            _walk(builder, owner, -1, world_size - 1, first)
            _walk(builder, owner, 1, world_size - 1, second)
        return builder.finish()
    for owner in range(world_size):
        builder.compute(owner, owner, rank=owner, step=0)
        extra = (world_size - 1) % 2
        down = (world_size - 1) // 2 + (extra if owner % 2 == 0 else 0)
        _walk(builder, owner, -1, down, problem.all_heads, computes_own=False)
        _walk(builder, owner, 1, world_size - 1 - down, problem.all_heads, computes_own=False)
    return builder.finish()


def _walk(
    builder: PlanBuilder, owner: int, sense: int, num_hops: int, heads: Heads, *, computes_own: bool = True
) -> None:
    world_size = builder.problem.world_size
    for step in range(0 if computes_own else 1, num_hops + 1):
        builder.compute(
            (owner + sense * step) % world_size, owner, rank=(owner + sense * step) % world_size, step=step, heads=heads
        )
    for step in range(num_hops):
        source, destination = (owner + sense * step) % world_size, (owner + sense * (step + 1)) % world_size
        builder.hop("kv", owner, source=source, destination=destination, step=step, heads=heads)
