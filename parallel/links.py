"""What the planner knows of the machine: how fast ranks compute and how fast bytes travel between them."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

TOPOLOGIES = ("switch", "mesh")


@dataclass(frozen=True, slots=True)
class LinkModel:
    """Links of one group, each way at once at full speed.

    Args:
        topology: ``switch``: all that a rank sends shares one port, and so does all that it receives; ``mesh``: every
            pair of ranks has a link of its own.
        bytes_per_s: of a port or a link, within a node.
        latency_s: of a message.
        node_bytes_per_s, node_latency_s: the same between nodes; 0: as within one.
        flops_per_s: floating-point operations of attention that a rank computes.
    """

    topology: str = "switch"
    bytes_per_s: float = 50e9
    latency_s: float = 20e-6
    node_bytes_per_s: float = 0.0
    node_latency_s: float = 0.0
    flops_per_s: float = 400e12

    def __post_init__(self) -> None:
        if self.topology not in TOPOLOGIES:
            raise ValueError(f"topology={self.topology!r} is not allowed: one of {', '.join(TOPOLOGIES)}")
        for name in ("bytes_per_s", "flops_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: above 0")

    def seconds(self, num_bytes: int, *, between_nodes: bool) -> float:
        """How long a message takes on an empty link, without its latency."""
        return num_bytes / (self.node_bytes_per_s or self.bytes_per_s if between_nodes else self.bytes_per_s)

    def latency(self, *, between_nodes: bool) -> float:
        """Of a message."""
        return self.node_latency_s or self.latency_s if between_nodes else self.latency_s

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def load_links(path: Path) -> LinkModel:
    """What ``save`` wrote. Raises ``ValueError`` naming what is wrong with the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a link model: {error}") from None
    known = {field.name for field in fields(LinkModel)}
    unknown = sorted(set(content) - known) if isinstance(content, dict) else ["not an object"]
    if unknown:
        raise ValueError(f"{path}: {unknown[0]!r} is not allowed: {', '.join(sorted(known))}")
    return LinkModel(**content)
