"""The workers as Ray actors: the only module that wraps them. Everything else of theirs runs without Ray."""

import dataclasses
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ServeConfig
from cluster.rank_worker import RankWorker
from cluster.ray_handle import RayHandle, find_worker, list_actors
from cluster.resources import Needs
from cluster.serving_worker import ServingWorker
from longctx.errors import LongctxError
from longctx.terminal_log import log_to_terminal

MAX_RESTARTS = 20  # by Ray, after a worker process died; the router makes it load the model again
PLACE_TIMEOUT_S = 60.0
MAX_CALLS = 1024  # coroutines of one actor at a time


class WorkerActor(ServingWorker):
    """A worker in a process of its own."""

    def __init__(self, name: str, role: str, config: ServeConfig) -> None:
        self._deployment = config
        config, ranks = _on_this_node(name, config), _find_ranks(name, role, config)
        super().__init__(name, role, config, node_id=_node_id(), ranks=ranks, on_lost=_end_process)
        self.deployment = self._deployment.digest

    async def describe_deployment(self) -> ServeConfig:
        """The configuration of the deployment: another worker of it takes the same."""
        return self._deployment


class RankActor(RankWorker):
    """Another rank of a worker, in a process of its own."""

    def __init__(self, name: str, role: str, config: ServeConfig) -> None:
        super().__init__(name, role, _on_this_node(name, config), node_id=_node_id(), on_lost=_end_process)


@dataclass(frozen=True, slots=True)
class ActorGroup:
    """The actors of one worker."""

    handle: RayHandle  # rank 0, which the router knows
    ranks: tuple[RayHandle, ...]
    placement: PlacementGroup | None  # where they are, if they are several

    def kill(self) -> None:
        """End their processes for good."""
        for handle in (self.handle, *self.ranks):
            with suppress(Exception):  # each is tried whatever became of the one before
                ray.kill(handle.actor, no_restart=True)
        if self.placement is not None:
            with suppress(Exception):
                remove_placement_group(self.placement)


def create_worker(
    name: str,
    role: str,
    config: ServeConfig,
    *,
    needs: Needs,
    env_vars: dict[str, str],
    outlives_us: bool = False,
    waits: bool = True,
) -> ActorGroup:
    """Create the actors of worker ``name``; they load nothing before its ``start``.

    Args:
        name, role, config: see ``Worker``.
        needs: of each of its processes.
        env_vars: of these.
        outlives_us: they do not end with this process.
        waits: for room for its ranks; else they stay a demand of the cluster, as a worker of one rank does in any case.

    Raises:
        ValueError: if the name is taken.
        LongctxError: if the cluster has no room for its ranks.
    """
    own = config.cluster.group_of(role)
    degree = own.sp_degree
    options: dict[str, Any] = {
        "namespace": config.ray.namespace,
        "num_cpus": needs.num_cpus,
        "num_gpus": needs.num_gpus,
        "resources": needs.resources,
        "max_concurrency": MAX_CALLS,
        "max_restarts": MAX_RESTARTS,
        "max_task_retries": 0,
        "scheduling_strategy": "SPREAD" if config.cluster.worker_strategy == "SPREAD" else "DEFAULT",
    }
    if needs.labels and degree == 1:  # those of several are in a placement group, which has them
        options["label_selector"] = needs.labels
    if outlives_us:
        options["lifetime"] = "detached"
    if env_vars:
        options["runtime_env"] = {"env_vars": env_vars}
    placement = None
    if degree > 1:
        placement = _place(_placement_name(name, config.ray.namespace), degree, needs, own.rank_strategy, outlives_us)
        if waits:
            _await_place(placement, degree, needs)

    def place(rank: int) -> dict[str, Any]:
        if placement is None:
            return options
        strategy = PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank)
        return options | {"scheduling_strategy": strategy}

    ranks: list[RayHandle] = []
    try:
        for rank in range(1, degree):
            rank_name = _rank_name(name, rank)
            actor = ray.remote(RankActor).options(name=rank_name, **place(rank)).remote(rank_name, role, config)
            ranks.append(RayHandle(rank_name, role, actor))
        actor = ray.remote(WorkerActor).options(name=name, **place(0)).remote(name, role, config)
    except BaseException:
        for handle in ranks:
            ray.kill(handle.actor, no_restart=True)
        if placement is not None:
            remove_placement_group(placement)
        raise
    return ActorGroup(RayHandle(name, role, actor), tuple(ranks), placement)


def _place(name: str, num_ranks: int, needs: Needs, strategy: str, outlives_us: bool) -> PlacementGroup:
    """Room for the ranks of one worker, once there is."""
    return placement_group(
        [needs.bundle] * num_ranks,
        strategy=strategy,
        name=name,
        lifetime="detached" if outlives_us else None,
        bundle_label_selector=[needs.labels] * num_ranks if needs.labels else None,  # pyright: ignore[reportArgumentType]
    )


def _await_place(placement: PlacementGroup, num_ranks: int, needs: Needs) -> None:
    if placement.wait(PLACE_TIMEOUT_S):
        return
    remove_placement_group(placement)
    free = ray.available_resources()
    raise LongctxError(
        f"a worker of {num_ranks} ranks (sp_degree) with {needs} each (cluster.worker_cpus, cluster.worker_gpus, and "
        "resources of its role) has no room in the Ray cluster, which has "
        f"{free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs free"
    )


def _placement_name(name: str, namespace: str) -> str:
    return f"{namespace}/{name}"


def kill_worker(handle: RayHandle, namespace: str) -> None:
    """End a worker's processes for good, whoever made them, and give its room back."""
    for name in list_actors(namespace):
        if name.startswith(f"{handle.name}."):
            with suppress(Exception):  # it may have gone
                ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)
    with suppress(Exception):
        ray.kill(handle.actor, no_restart=True)
    with suppress(ValueError):  # it has one rank
        remove_placement_group(get_placement_group(_placement_name(handle.name, namespace)))


def _find_ranks(name: str, role: str, config: ServeConfig) -> list[RayHandle]:
    """Handles of the other ranks: by name, since handles among a constructor's arguments do not outlive a restart."""
    degree = config.cluster.group_of(role).sp_degree
    return [find_worker(_rank_name(name, rank), role, config.ray.namespace) for rank in range(1, degree)]


def _rank_name(name: str, rank: int) -> str:
    return f"{name}.{rank}"


def _node_id() -> str:
    return ray.get_runtime_context().get_node_id()


def _end_process(reason: str) -> None:
    """A rank is lost: the others' states are of no more use. Ray starts this process anew, empty."""
    logging.getLogger(__name__).error("ending: %s", reason)
    os._exit(1)


def _on_this_node(name: str, config: ServeConfig) -> ServeConfig:
    """Logging for this process, and the node's address for what listens here."""
    log_to_terminal(name, logging.INFO)
    logging.getLogger("longctx.models.loading").setLevel(logging.WARNING)  # the engine's line says as much
    if config.transport.host is not None:
        return config
    transport = dataclasses.replace(config.transport, host=ray.util.get_node_ip_address())
    return dataclasses.replace(config, transport=transport)
