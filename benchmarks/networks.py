"""Networks of this machine's own: ranks in network namespaces, behind a switch or each pair with a link, slowed down.

Needs root, ``ip`` and ``tc`` (iproute2). Nothing of the machine's own network is touched, and nothing is left behind.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

TOPOLOGIES = ("switch", "mesh")
QUEUE_MS = 400  # what waits at a full link: enough that nothing is dropped
LEAST_BURST_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Network:
    """Namespaces, one for each rank, that reach each other at ``mbit_per_s``."""

    names: tuple[str, ...]
    topology: str
    mbit_per_s: float
    interface: str  # whose address a rank goes by

    def command(self, rank: int) -> list[str]:
        """Words before a command that run it where ``rank`` is."""
        return ["ip", "netns", "exec", self.names[rank]]

    def address(self, rank: int) -> str:
        """What the others reach ``rank`` by."""
        return f"10.{71 if self.topology == 'switch' else 72}.0.{rank + 1}"

    def count_sent(self, rank: int) -> int:
        """Bytes that a rank's links have sent so far, frames and acknowledgements included."""
        done = subprocess.run(
            ["ip", "-n", self.names[rank], "-json", "-stats", "link"], capture_output=True, check=True
        )
        links = [link for link in json.loads(done.stdout) if link["ifname"].startswith("link")]
        return sum(link["stats64"]["tx"]["bytes"] for link in links)


def can_make_networks() -> bool:
    """Whether this process may make namespaces and shape their links."""
    if os.geteuid() != 0:
        return False
    try:
        with make_network(2, "switch", 100):
            return True
    except (OSError, RuntimeError):
        return False


@contextmanager
def make_network(world_size: int, topology: str, mbit_per_s: float) -> Iterator[Network]:
    """A network until the block ends; raises ``RuntimeError`` with what ``ip`` or ``tc`` said."""
    names = tuple(f"lcx-{os.getpid()}-{rank}" for rank in range(world_size))
    switch = f"lcx-{os.getpid()}-switch"
    made: list[str] = []
    try:
        for name in (*names, *([switch] if topology == "switch" else [])):
            run("ip", "netns", "add", name)
            made.append(name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        if topology == "switch":
            _join_switch(names, switch, mbit_per_s)
        else:
            _join_pairs(names, mbit_per_s)
        yield Network(names, topology, mbit_per_s, "link0" if topology == "switch" else "own")
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _join_switch(names: tuple[str, ...], switch: str, mbit_per_s: float) -> None:
    run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
    run("ip", "-n", switch, "link", "set", "bridge", "up")
    for rank, name in enumerate(names):
        port = f"port{rank}"
        run("ip", "link", "add", "link0", "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
        run("ip", "-n", name, "address", "add", f"10.71.0.{rank + 1}/24", "dev", "link0")
        run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
        run("ip", "-n", name, "link", "set", "link0", "up")
        _slow_down(name, "link0", mbit_per_s)  # what the rank sends
        _slow_down(switch, port, mbit_per_s)  # what it receives


def _join_pairs(names: tuple[str, ...], mbit_per_s: float) -> None:
    """Every rank has one address, on a bridge without ports; a route for each peer leads over the pair's own link."""
    for rank, name in enumerate(names):
        run("ip", "-n", name, "link", "add", "own", "type", "bridge")
        run("ip", "-n", name, "address", "add", f"10.72.0.{rank + 1}/32", "dev", "own")
        run("ip", "-n", name, "link", "set", "own", "up")
    for index, (low, high) in enumerate(combinations(range(len(names)), 2)):
        ends = [(low, high, f"10.73.{index}.1"), (high, low, f"10.73.{index}.2")]
        first, second = f"link{high}", f"link{low}"
        run(
            "ip",
            "link",
            "add",
            first,
            "netns",
            names[low],
            "type",
            "veth",
            "peer",
            "name",
            second,
            "netns",
            names[high],
        )
        for rank, peer, address in ends:
            run("ip", "-n", names[rank], "address", "add", f"{address}/30", "dev", f"link{peer}")
            run("ip", "-n", names[rank], "link", "set", f"link{peer}", "up")
            _slow_down(names[rank], f"link{peer}", mbit_per_s)
        for (rank, peer, _), (_, _, gateway) in zip(ends, reversed(ends), strict=True):
            own = f"10.72.0.{rank + 1}"
            run("ip", "-n", names[rank], "route", "add", f"10.72.0.{peer + 1}", "via", gateway, "src", own)


def _slow_down(name: str, device: str, mbit_per_s: float) -> None:
    burst = max(LEAST_BURST_BYTES, int(mbit_per_s * 1e6 / 8 / 1000))  # what passes in 1 ms: little travels for nothing
    rate, latency = f"{mbit_per_s}mbit", f"{QUEUE_MS}ms"
    run(
        "tc",
        "-n",
        name,
        "qdisc",
        "add",
        "dev",
        device,
        "root",
        "tbf",
        "rate",
        rate,
        "burst",
        str(burst),
        "latency",
        latency,
    )


def run(*words: str) -> None:
    """A command that must succeed; raises ``RuntimeError`` with what it said."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
