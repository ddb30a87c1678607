"""USP (arXiv 2405.07719): Ulysses inside a node, a KV ring across nodes."""

from parallel.plan import Plan, PlanBuilder, Problem
from parallel.plans.hybrid import split_nodes
from parallel.plans.ulysses import share_of_heads


def plan_ulysses_ring(problem: Problem) -> Plan:
    """Step 0 exchanges heads inside each node; then a rank has its heads' keys of one node after the other."""
    num_nodes, node_size = split_nodes(problem)
    builder = PlanBuilder("ulysses_ring", problem)
    first = min(1, node_size - 1)  # step of the first computation
    for node in range(num_nodes):
        for index in range(node_size):
            _plan_owner(builder, node, index, first)
    return builder.finish()


def _plan_owner(builder: PlanBuilder, node: int, index: int, first: int) -> None:
    num_nodes, node_size = split_nodes(builder.problem)
    owner = node * node_size + index
    for peer in range(node_size):
        heads = share_of_heads(builder.problem.num_heads, peer, node_size)
        rank = node * node_size + peer
        builder.hop("q", owner, source=owner, destination=rank, step=0, heads=heads)
        builder.hop("kv", owner, source=owner, destination=rank, step=0, heads=heads)
        for outer in range(num_nodes):
            kv_node = (node + outer) % num_nodes
            for other in range(node_size):
                builder.compute(owner, kv_node * node_size + other, rank=rank, step=first + outer, heads=heads)
            if outer + 1 < num_nodes:
                source, destination = (node - outer) % num_nodes, (node - outer - 1) % num_nodes
                builder.hop(
                    "kv",
                    owner,
                    source=source * node_size + peer,
                    destination=destination * node_size + peer,
                    step=first + outer,
                    heads=heads,
                )
