"""Exchange plans by name: one file each, a function from a ``Problem`` to a ``Plan``."""

from parallel.registry import Registry

PLANS = Registry(
    "exchange plan",
    {
        "token_ring": "parallel.plans.token_ring:plan_token_ring",
        "kv_ring": "parallel.plans.kv_ring:plan_kv_ring",
        "kv_two_way": "parallel.plans.kv_two_way:plan_kv_two_way",
        "kv_direct": "parallel.plans.kv_direct:plan_kv_direct",
        "all_gather": "parallel.plans.all_gather:plan_all_gather",
        "ulysses": "parallel.plans.ulysses:plan_ulysses",
        "ulysses_ring": "parallel.plans.ulysses_ring:plan_ulysses_ring",
        "hybrid": "parallel.plans.hybrid:plan_hybrid",
        "q_direct": "parallel.plans.q_direct:plan_q_direct",
        "fewest_bytes": "parallel.plans.fewest_bytes:plan_fewest_bytes",
    },
)
