"""Ranks of a torch.distributed group as Ray actors: spread over the cluster's nodes, in the order of the nodes."""

import datetime
import os
import socket
from collections.abc import Sequence
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from longctx.errors import LongctxError

PLACE_TIMEOUT_S = 60.0
JOIN_TIMEOUT_S = 120.0


class RankActor:
    """One rank, in a process of its own."""

    def where(self) -> tuple[str, str, int]:
        """Node id, address, and a port that is free there."""
        address = ray.util.get_node_ip_address()
        with socket.create_server((address, 0)) as probe:
            port = probe.getsockname()[1]
        return ray.get_runtime_context().get_node_id(), address, port

    def join(self, rank: int, world_size: int, address: str, port: int) -> None:
        """Become ``rank`` of a gloo group that meets at rank 0's address."""
        import torch.distributed as dist

        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_of(ray.util.get_node_ip_address()))
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
        order = _by_node([node for node, _, _ in places])
        self._actors = [self._actors[index] for index in order]
        _, address, port = places[order[0]]
        size = len(order)
        ray.get([actor.join.remote(rank, size, address, port) for rank, actor in enumerate(self._actors)])

    def __enter__(self) -> "RankGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _by_node(nodes: Sequence[str]) -> list[int]:
    """Indices with those of one node side by side."""
    first = {node: nodes.index(node) for node in nodes}
    return sorted(range(len(nodes)), key=lambda index: (first[nodes[index]], index))


def _interface_of(address: str) -> str:
    """The interface that has ``address``: gloo would take the one of the host's name."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    raise LongctxError(f"no interface of {socket.gethostname()} has the address {address}")
