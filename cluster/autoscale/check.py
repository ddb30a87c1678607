"""What can be wrong with ``cluster.autoscale`` and with the nodes of each role, before anything runs."""

import re

from cluster.config import ROLES, ClusterConfig
from longctx.errors import ConfigError

# As Ray has them: value, !value, in(a,b), !in(a,b).
SELECTOR = re.compile(r"!?(in\([\w.-]+(, ?[\w.-]+)*\)|[\w.-]+)")


def check_scaling(cluster: ClusterConfig) -> None:
    """Raises ``ConfigError`` for bounds that exclude each other, or what there is at the start."""
    scaling = cluster.autoscale
    if not scaling.enabled:
        return
    for role in ROLES:
        pool, key = scaling.pool_of(role), f"cluster.autoscale.{role}"
        num_workers, count_key = cluster.count_workers(role), f"cluster.num_{role}_workers"
        if not num_workers:
            if pool.max_workers > 1:
                raise ConfigError(
                    f"{key}.max_workers={pool.max_workers} is not allowed with {count_key}=0: decode workers that were "
                    f"started without prefill workers take no KV; use {count_key}=1 or more"
                )
            continue
        if pool.min_workers > pool.max_workers:
            raise ConfigError(
                f"{key}.min_workers={pool.min_workers} is not allowed with {key}.max_workers={pool.max_workers}: "
                "at most as many"
            )
        if not pool.min_workers <= num_workers <= pool.max_workers:
            raise ConfigError(
                f"{count_key}={num_workers}, the workers at the start, is not allowed with {key}.min_workers="
                f"{pool.min_workers} and {key}.max_workers={pool.max_workers}: from {pool.min_workers} to "
                f"{pool.max_workers}"
            )
    roles = [role for role in ROLES if cluster.count_workers(role)]
    if all(scaling.pool_of(role).min_workers == scaling.pool_of(role).max_workers for role in roles):
        raise ConfigError(
            "cluster.autoscale.enabled=true is not allowed where every pool's min_workers is its max_workers: give "
            + " or ".join(f"cluster.autoscale.{role}.max_workers" for role in roles)
            + " more"
        )
    if scaling.window_s < scaling.interval_s:
        raise ConfigError(
            f"cluster.autoscale.window_s={scaling.window_s:g} is not allowed with cluster.autoscale.interval_s="
            f"{scaling.interval_s:g}: at least as long"
        )


def check_nodes(cluster: ClusterConfig) -> None:
    """Raises ``ConfigError`` for resources and labels that Ray would not take."""
    for role in ROLES:
        own, key = cluster.group_of(role), f"cluster.{role}"
        try:
            own.read_resources()
        except ValueError as error:
            raise ConfigError(f"{key}.resources={own.resources} is not allowed: {error}") from None
        for name, value in own.node_labels.items():
            if not SELECTOR.fullmatch(value):
                raise ConfigError(
                    f"{key}.node_labels: {name}={value!r} is not allowed: value, !value, in(a,b) or !in(a,b)"
                )
