"""What the planner knows of the machine: how fast ranks compute and how fast bytes travel between them."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from parallel.option import check, option

TOPOLOGIES = ("switch", "mesh")


@dataclass(frozen=True, slots=True)
class LinkModel:
    """Links of one group, each way at once at full speed. Raises ``ValueError`` for a value that is not allowed.

    At a ``switch``, all that a rank sends shares one port, and so does all that it receives; in a ``mesh`` every pair
    of ranks has a link of its own.
    """

    topology: str = option("switch", "whether a rank's links share a port", choices=TOPOLOGIES)
    bytes_per_s: float = option(50e9, "bytes a second of a port or a link, within a node", above=0)
    latency_s: float = option(20e-6, "seconds until a message's first byte arrives", minimum=0)
    message_s: float = option(0.0, "seconds that any message, however small, takes each of its ends", minimum=0)
    node_bytes_per_s: float = option(0.0, "bytes a second between nodes; 0: as within one", minimum=0)
    node_latency_s: float = option(0.0, "latency between nodes; 0: as within one", minimum=0)
    tile_s: float = option(
        0.0, "seconds of any tile's forward, however small; its backward takes 2.5 times as long", minimum=0
    )
    host_byte_s: float = option(
        0.0, "seconds of computing that a byte costs each of its ends while they compute", minimum=0
    )
    flops_per_s: float = option(400e12, "floating-point operations of attention a second, of one rank", above=0)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "topology" and not isinstance(value, int | float):
                raise ValueError(f"links.{name}={value!r} is not allowed: a number")
        check(self, "links.")

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
