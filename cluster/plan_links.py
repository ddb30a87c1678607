"""``longctx plan links``: measures the link model over ranks of a running cluster, and saves it for the planner."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import PlanLinksConfig
from cluster.local_ray import RaySession
from longctx.errors import ConfigError, LongctxError

if TYPE_CHECKING:
    from parallel.link_measurement import Measurement


def plan_links(config: PlanLinksConfig) -> int:
    """Measure, print and save; returns the exit code."""
    path = Path(config.file)
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"file={path} is not allowed: there is no folder {path.parent}")
    session = RaySession(config.ray)
    session.start()
    try:
        measurement = _measure(config)
    finally:
        session.stop()
    try:
        measurement.links.save(path)
    except OSError as error:
        raise ConfigError(f"file={path} cannot be written: {error.strerror}") from None
    sys.stdout.write(describe(measurement) + f"\nsaved: {path}; longctx plan attention links_file={path} uses it\n")
    return 0


def describe(measurement: "Measurement") -> str:
    """What was measured, as text."""
    links = measurement.links
    lines = [
        f"{len(measurement.node_of)} ranks on {len(set(measurement.node_of))} node(s), MB/s from row to column:",
        "",
        "      " + "".join(f"{peer:>9}" for peer in range(len(measurement.node_of))),
    ]
    for rank, row in enumerate(measurement.bytes_per_s):
        cells = "".join(f"{rate / 1e6:>9.1f}" if rate else f"{'-':>9}" for rate in row)
        lines.append(f"{rank:>6}" + cells + f"   {measurement.node_of[rank]}")
    lines += [
        "",
        f"to all at once a rank sends {measurement.all_at_once:.2f} times what it sends to one: a {links.topology}",
        f"within a node {links.bytes_per_s / 1e6:.1f} MB/s, {links.latency_s * 1e6:.0f} us, "
        f"{links.message_s * 1e6:.0f} us a message",
    ]
    if links.node_bytes_per_s:
        lines.append(f"between nodes {links.node_bytes_per_s / 1e6:.1f} MB/s, {links.node_latency_s * 1e6:.0f} us")
    lines.append(
        f"attention at {links.flops_per_s / 1e9:.1f} GFLOP/s a rank, {links.tile_s * 1e6:.0f} us a tile, all at it; "
        f"{links.host_byte_s * 1e9:.2f} s less for every GB sent or received"
    )
    if measurement.num_nodes == 1 < len(set(measurement.node_of)):
        lines.append("the nodes hold unequal numbers of ranks: plans that need num_nodes cannot use them")
    return "\n".join(lines)


def _measure(config: PlanLinksConfig) -> "Measurement":
    import ray
    from ray.exceptions import RayError

    from cluster.rank_group import RankGroup

    num_cpus = min(1.0, ray.cluster_resources().get("CPU", 1.0) / config.world_size)
    try:
        with RankGroup(config.world_size, num_cpus=num_cpus) as group:
            return group.run(_measure_here)[0]
    except RayError as error:
        raise LongctxError(f"the links could not be measured: {error}") from error


def _measure_here() -> "Measurement":
    import ray

    from parallel.link_measurement import measure_links

    return measure_links(None, node=ray.util.get_node_ip_address())
