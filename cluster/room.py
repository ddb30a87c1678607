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


WORDS = {
    "PACK": "they have room for {}",
    "SPREAD": "they have room for {}",
    "STRICT_PACK": "one has to take all (cluster.strategy=STRICT_PACK), and the largest has room for {}",
    "STRICT_SPREAD": "each rank needs one of its own (cluster.strategy=STRICT_SPREAD), and {} have room for one",
}


def find_shortage(nodes: Sequence[dict[str, float]], num_ranks: int, bundle: Bundle, strategy: str) -> str:
    """Why ``num_ranks`` bundles cannot be placed even on empty nodes, and what can; empty if they can.

    Args:
        nodes: resources of each, as Ray counts them.
        num_ranks: bundles to place.
        bundle: one rank's.
        strategy: Ray's placement strategy.
    """
    limit = _count_room(nodes, bundle, strategy)
    if num_ranks <= limit:
        return ""
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    told = f"{bundle}; its {len(nodes)} nodes have {cpus:g} CPUs and {gpus:g} GPUs, {WORDS[strategy].format(limit)}"
    shares = (percent / 100 for percent in range(int(100 * bundle.num_cpus), 0, -1))
    fits = [share for share in shares if _count_room(nodes, Bundle(share, bundle.num_gpus), strategy) >= num_ranks]
    return f"{told}; cluster.cpus_per_rank={fits[0]:g} would fit, ranks sharing cores" if fits else told


def _count_room(nodes: Sequence[dict[str, float]], bundle: Bundle, strategy: str) -> int:
    """Bundles that empty nodes hold."""
    rooms = [
        min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in bundle.resources.items()) for node in nodes
    ]
    if strategy == "STRICT_PACK":
        return max(rooms, default=0)
    return sum(room > 0 for room in rooms) if strategy == "STRICT_SPREAD" else sum(rooms)
