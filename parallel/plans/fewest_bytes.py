"""Each pair of ranks meets where fewer bytes have to travel: queries to the keys, or keys to the queries, directly.

The candidate that ``auto`` weighs against the named plans. In step s, ranks exchange with those at distance s, so
that on a switch everybody sends to one and receives from one at a time.
"""

from parallel.plan import Plan, PlanBuilder, Problem, count_rows, rows_of, unite


def plan_fewest_bytes(problem: Problem) -> Plan:
    """KV goes to the queries unless queries there and outputs back are fewer bytes."""
    builder, world_size = PlanBuilder("fewest_bytes", problem), problem.world_size
    for q_owner in range(world_size):
        for kv_owner in range(world_size):
            if q_owner == kv_owner:
                builder.compute(q_owner, q_owner, rank=q_owner, step=0)
            elif _moves_queries(problem, q_owner, kv_owner):
                step = (q_owner - kv_owner) % world_size
                builder.hop("q", q_owner, source=q_owner, destination=kv_owner, step=step - 1)
                builder.compute(q_owner, kv_owner, rank=kv_owner, step=step)
            else:
                step = (kv_owner - q_owner) % world_size
                builder.hop("kv", kv_owner, source=kv_owner, destination=q_owner, step=step - 1)
                builder.compute(q_owner, kv_owner, rank=q_owner, step=step)
    return builder.finish()


def _moves_queries(problem: Problem, q_owner: int, kv_owner: int) -> bool:
    tiles = problem.tiles(q_owner, kv_owner)
    num_q, num_kv = count_rows(unite(rows_of(tiles, "q"))), count_rows(unite(rows_of(tiles, "kv")))
    there_and_back = problem.head_dim * problem.element_size + (problem.head_dim + 1) * problem.accumulator_size
    return num_q * problem.num_heads * there_and_back < (
        2 * num_kv * problem.num_kv_heads * problem.head_dim * problem.element_size
    )
