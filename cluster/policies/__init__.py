"""Policies: which workers a request goes to. A new one is one module here and one line in ``POLICIES``."""

from parallel.registry import Registry

POLICIES = Registry(
    "policy",
    {
        "shortest_queue": "cluster.policies.shortest_queue:ShortestQueue",
        "splitwise": "cluster.policies.splitwise:Splitwise",
        "cache_aware": "cluster.policies.cache_aware:CacheAware",
    },
)
