"""KV ring across nodes, TokenRing inside each (TokenRing's section on several nodes, of which there is no public code).

Queries walk their node's ring once and stay with their hosts, so a host adds up what it computes for them over all
nodes' keys and sends it home once.
"""

from parallel.plan import Plan, PlanBuilder, Problem


def plan_hybrid(problem: Problem) -> Plan:
    """Outer step t: node A holds the keys of node A + t; inner step u: its rank j hosts queries of its rank j + u."""
    num_nodes, node_size = split_nodes(problem)
    builder = PlanBuilder("hybrid", problem)
    for node in range(num_nodes):
        for index in range(node_size):
            owner = node * node_size + index
            for outer in range(num_nodes):
                _walk_queries(builder, node, index, outer)
                if outer + 1 < num_nodes:
                    source, destination = (node - outer) % num_nodes, (node - outer - 1) % num_nodes
                    builder.hop(
                        "kv",
                        owner,
                        source=source * node_size + index,
                        destination=destination * node_size + index,
                        step=outer * node_size,
                    )
    return builder.finish()


def _walk_queries(builder: PlanBuilder, node: int, index: int, outer: int) -> None:
    num_nodes, node_size = split_nodes(builder.problem)
    owner = node * node_size + index
    for inner in range(node_size):
        host = node * node_size + (index - inner) % node_size
        kv_owner = (node + outer) % num_nodes * node_size + (index - inner) % node_size
        builder.compute(owner, kv_owner, rank=host, step=outer * node_size + inner)
        if outer == 0 and inner + 1 < node_size:
            destination = node * node_size + (index - inner - 1) % node_size
            builder.hop("q", owner, source=host, destination=destination, step=inner)


def split_nodes(problem: Problem) -> tuple[int, int]:
    """Nodes and ranks per node; ``ValueError`` if the ranks do not spread evenly."""
    if problem.world_size % problem.num_nodes:
        raise ValueError(
            f"{problem.world_size} ranks on {problem.num_nodes} nodes: every node must have the same number"
        )
    return problem.num_nodes, problem.world_size // problem.num_nodes
