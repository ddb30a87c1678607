"""All workers of a deployment: how many, with which resources, and their start. Whoever calls owns them."""

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.actors import ActorGroup, create_worker
from cluster.config import ROLES, ServeConfig, ServerConfig
from cluster.ray_handle import list_workers
from cluster.resources import find_needs, list_nodes, suits
from longctx.errors import ConfigError, LongctxError
from longctx.threads import THREAD_ENV

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 10.0


def create_workers(config: ServeConfig, nodes: Sequence[dict[str, Any]], *, shares_cores: bool) -> Iterator[ActorGroup]:
    """Create the actors of one worker after the other; they load nothing before their start.

    Args:
        config: the deployment's.
        nodes: of the cluster, alive.
        shares_cores: several processes compute on one node.
    """
    config = without_endpoint(config)
    for role in ROLES:
        there = list_nodes(nodes)
        needs = find_needs(config, there, role)
        if config.cluster.count_workers(role) and not any(suits(config.cluster.group_of(role), node) for node in there):
            logger.warning("%s workers wait for a node of their kind, of which there is none yet: %s", role, needs)
        for number in range(config.cluster.count_workers(role)):
            env_vars = THREAD_ENV if shares_cores else {}
            try:
                yield create_worker(f"{role}-{number}", role, config, needs=needs, env_vars=env_vars)
            except ValueError as error:  # the name is taken
                namespace = config.ray.namespace
                raise ConfigError(f"ray.namespace={namespace!r} is in use in this cluster: {error}") from None


def create_another(config: ServeConfig, role: str, *, outlives_us: bool = False, waits: bool = True) -> ActorGroup:
    """Create the actors of one more worker of a deployment that runs; see ``create_worker``."""
    config = without_endpoint(config)
    nodes = list_nodes(ray.nodes())
    needs = find_needs(config, nodes, role)
    taken = {handle.name for handle in list_workers(config.ray.namespace)}
    name = next(name for number in itertools.count() if (name := f"{role}-{number}") not in taken)
    env_vars = THREAD_ENV if max(config.cluster.max_processes, len(taken) + 1) > len(nodes) else {}
    return create_worker(name, role, config, needs=needs, env_vars=env_vars, outlives_us=outlives_us, waits=waits)


def without_endpoint(config: ServeConfig) -> ServeConfig:
    """As workers get it: the endpoint's keys are no business of theirs."""
    return dataclasses.replace(config, server=ServerConfig())


def start_workers(groups: Sequence[ActorGroup]) -> dict[Any, str]:
    """Let them load the model; the names of the workers, by what ``wait_for_workers`` waits for."""
    return {group.handle.actor.start.remote(): group.handle.name for group in groups}


def wait_for_workers(starts: dict[Any, str], *, timeout_s: float, failure: Sequence[BaseException] = ()) -> None:
    """Until all workers have loaded the model, or ``failure`` has something. Raises ``LongctxError`` saying why not."""
    begun = time.monotonic()
    pending, due = list(starts), begun + PROGRESS_INTERVAL_S
    while pending and not failure:
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=0.5)
        for reference in set(starts) - set(pending):
            try:
                ray.get(reference)
            except RayTaskError as error:
                if isinstance(error.cause, LongctxError):
                    raise error.cause from None
                reason = getattr(error.cause, "strerror", None) or error.cause or error
                raise LongctxError(f"{starts[reference]} cannot start: {reason}") from None
            except RayError as error:
                raise LongctxError(f"{starts[reference]} died while it loaded the model: {error}") from None
        waited = time.monotonic() - begun
        if pending and time.monotonic() > due:
            due += PROGRESS_INTERVAL_S
            logger.info("%d of %d workers are still loading after %.0f s", len(pending), len(starts), waited)
        if waited > timeout_s:
            raise LongctxError(
                f"{len(pending)} workers did not load the model in {timeout_s:g} s "
                "(cluster.start_timeout_s); is there room for them in the Ray cluster (cluster.worker_cpus)?"
            )
