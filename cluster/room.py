"""Whether ranks fit the nodes of a cluster: arithmetic over their resources, without Ray."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bundle:
    """What is reserved for one rank."""

    num_cpus: float
    num_gpus: float

    @property
    def resources(self) -> dict[str, float]:
        """As Ray takes it: no zeros, and not nothing."""
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return {name: amount for name, amount in wanted.items() if amount} or {"CPU": 0.001}

    def __str__(self) -> str:
        return f"{self.num_cpus:g} CPUs and {self.num_gpus:g} GPUs each (cluster.cpus_per_rank, cluster.gpus_per_rank)"


def find_shortage(nodes: Sequence[dict[str, float]], num_ranks: int, bundle: Bundle, strategy: str) -> str:
    """Why ``num_ranks`` bundles cannot be placed even on empty nodes, and what can; empty if they can.

    Args:
        nodes: resources of each, as Ray counts them.
        num_ranks: bundles to place.
        bundle: one rank's.
        strategy: Ray's placement strategy.
    """
    rooms = [_count_room(node, bundle) for node in nodes]
    limits = {
        "PACK": (sum(rooms), "they have room for {}"),
        "SPREAD": (sum(rooms), "they have room for {}"),
        "STRICT_PACK": (max(rooms, default=0), "one node has to take all (cluster.strategy=STRICT_PACK), and the "
                        "largest has room for {}"),
        "STRICT_SPREAD": (sum(room > 0 for room in rooms), "each needs a node of its own (cluster.strategy="
                          "STRICT_SPREAD), and {} have room for one"),
    }  # fmt: skip
    limit, words = limits[strategy]
    if num_ranks <= limit:
        return ""
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    told = f"{bundle}; its {len(nodes)} nodes have {cpus:g} CPUs and {gpus:g} GPUs, {words.format(limit)}"
    share = min(1.0, int(100 * cpus / num_ranks) / 100)
    if share and share < bundle.num_cpus and gpus >= bundle.num_gpus * num_ranks:
        told += f"; cluster.cpus_per_rank={share:g} would fit if they can share cores"
    return told


def _count_room(node: dict[str, float], bundle: Bundle) -> int:
    """Bundles that an empty node holds."""
    return min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in bundle.resources.items())
