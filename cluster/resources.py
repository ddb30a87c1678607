"""What Ray reserves for each process that serves, and on which nodes: arithmetic over the nodes, without Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.config import ROLES, ServeConfig
from cluster.role_config import RoleConfig


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a cluster."""

    resources: Mapping[str, float]  # as Ray counts them
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Needs:
    """What each process of one worker asks Ray for."""

    num_cpus: float
    num_gpus: float
    resources: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)  # of its node, as label selectors

    @property
    def bundle(self) -> dict[str, float]:
        """As a placement group takes it."""
        return {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {}) | self.resources

    def __str__(self) -> str:
        own = "".join(f", {amount:g} {name}" for name, amount in self.resources.items())
        where = "".join(f", on nodes with {name}={value}" for name, value in self.labels.items())
        return f"{self.num_cpus:g} CPUs, {self.num_gpus:g} GPUs{own}{where}"


def list_nodes(entries: Sequence[dict[str, Any]]) -> list[Node]:
    """The nodes that are alive of what ``ray.nodes()`` returns."""
    return [Node(entry["Resources"], entry.get("Labels") or {}) for entry in entries if entry["Alive"]]


def find_needs(config: ServeConfig, nodes: Sequence[Node], role: str) -> Needs:
    """What the processes of one role ask for."""
    own = config.cluster.group_of(role)
    return Needs(*share_resources(config, nodes, role), own.read_resources(), own.node_labels)


def suits(own: RoleConfig, node: Node) -> bool:
    """Whether a node is of a kind that the workers of a role may run on."""
    has_all = all(node.resources.get(name, 0.0) >= amount for name, amount in own.read_resources().items())
    return has_all and all(_matches(node.labels.get(name), wanted) for name, wanted in own.node_labels.items())


def share_resources(config: ServeConfig, nodes: Sequence[Node], role: str) -> tuple[float, float]:
    """CPUs and GPUs that Ray is to reserve for each process. Without a GPU of its own a process sees none.

    What is not configured is a share of the nodes of the role's kind, among all processes that may run on them once
    every pool is as large as it may be.

    Args:
        config: the deployment's.
        nodes: that are alive.
        role: of the worker.
    """
    cluster, own = config.cluster, config.cluster.group_of(role)
    mine = [node for node in nodes if suits(own, node)] or nodes
    guests = [each for each in ROLES if each == role or any(suits(cluster.group_of(each), node) for node in mine)]
    num_processes = max(1, sum(cluster.max_workers(each) * cluster.group_of(each).sp_degree for each in guests))
    cpus, gpus = (sum(node.resources.get(kind, 0) for node in mine) / num_processes for kind in ("CPU", "GPU"))
    num_cpus = own.worker_cpus or cluster.worker_cpus or max(0.05, min(1.0, cpus))
    if config.model.device == "cpu":
        return num_cpus, 0.0
    if own.worker_gpus is not None:
        return num_cpus, own.worker_gpus
    return num_cpus, min(1.0, int(gpus * 100) / 100) if cluster.worker_gpus is None else cluster.worker_gpus


def _matches(label: str | None, wanted: str) -> bool:
    """Ray's label selectors: ``value``, ``!value``, ``in(a,b)`` and ``!in(a,b)``."""
    text = wanted.removeprefix("!")
    values = text[3:-1].split(",") if text.startswith("in(") else [text]
    return (label in [value.strip() for value in values]) != wanted.startswith("!")
