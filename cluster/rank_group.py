"""Ranks of a torch.distributed group as Ray actors: spread over the cluster's nodes, in the order of the nodes."""

import datetime
import os
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.node_address import interface_of
from longctx.errors import LongctxError
from longctx.training.place import find_port, order_ranks

PLACE_TIMEOUT_S = 60.0
JOIN_TIMEOUT_S = 120.0


class RankActor:
    """One rank, in a process of its own."""

    def where(self) -> tuple[str, str, int]:
        """Node id, address, and a port that is free there."""
        address = ray.util.get_node_ip_address()
        return ray.get_runtime_context().get_node_id(), address, find_port(address)

    def join(self, rank: int, world_size: int, address: str, port: int) -> None:
        """Become ``rank`` of a gloo group that meets at rank 0's address."""
        import torch.distributed as dist

        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(ray.util.get_node_ip_address()))
        timeout, meeting = datetime.timedelta(seconds=JOIN_TIMEOUT_S), f"tcp://{address}:{port}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=timeout)

    def run(self, function: Any, *args: Any) -> Any:
        """What ``function`` returns here; torch.distributed is up."""
        return function(*args)


class RankGroup:
    """A group of ``world_size`` ranks; a context manager that ends them.

    Raises:
        LongctxError: if the cluster has no room for them, or they do not reach each other.
    """

    def __init__(self, world_size: int, *, num_cpus: float) -> None:
        self._placement: PlacementGroup = placement_group([{"CPU": num_cpus}] * world_size, strategy="SPREAD")
        if not self._placement.wait(PLACE_TIMEOUT_S):
            remove_placement_group(self._placement)
            free = ray.available_resources().get("CPU", 0.0)
            raise LongctxError(
                f"{world_size} ranks of {num_cpus:g} CPUs have no room in the Ray cluster, which has {free:g} CPUs free"
            )
        create = ray.remote(RankActor)
        self._actors: list[Any] = [
            create.options(
                num_cpus=num_cpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._placement, placement_group_bundle_index=index
                ),
            ).remote()
            for index in range(world_size)
        ]
        try:
            self._join()
        except RayError as error:
            self.close()
            raise LongctxError(f"the ranks do not find each other: {error}") from error

    def run(self, function: Any, *args: Any) -> list[Any]:
        """Call ``function`` on all ranks at once; returns what each returned. Raises what one of them raised."""
        return ray.get([actor.run.remote(function, *args) for actor in self._actors])

    def close(self) -> None:
        """End the ranks."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._placement)

    def _join(self) -> None:
        """Ranks in the order of their nodes meet at the first one."""
        places = ray.get([actor.where.remote() for actor in self._actors])
        order = order_ranks([node for node, _, _ in places])
        self._actors = [self._actors[index] for index in order]
        _, address, port = places[order[0]]
        size = len(order)
        ray.get([actor.join.remote(rank, size, address, port) for rank, actor in enumerate(self._actors)])

    def __enter__(self) -> "RankGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
