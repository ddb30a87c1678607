"""Queries go straight to every rank that holds keys they see, partial outputs straight home: for decode, where queries
are few and keys are many (pass-Q, arXiv 2411.01783, without a ring)."""

from parallel.plan import Plan, PlanBuilder, Problem


def plan_q_direct(problem: Problem) -> Plan:
    """Everything is sent in step 0, while own keys are attended; step 1 attends what came."""
    builder, world_size = PlanBuilder("q_direct", problem), problem.world_size
    for owner in range(world_size):
        for host in range(world_size):
            builder.hop("q", owner, source=owner, destination=host, step=0)
            builder.compute(owner, host, rank=host, step=int(owner != host))
    return builder.finish()
