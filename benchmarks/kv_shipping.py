"""How much faster W prefill ranks ship a request's KV to decode, each its own part, than one rank that has it all.

    python -m benchmarks.kv_shipping --mbit 400 --save kv-shipping

Needs root. Each rank is a process in a network namespace of its own, and so is decode: in a mesh it has a link to every
rank, at a switch one port for all. In one run the ways take turns, in another order each round; a time runs from the
grant until the lease has committed, when every byte is in place and verified. Reported are medians.
"""

import argparse
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import REPOSITORY, describe_run, keep_result
from benchmarks.networks import TOPOLOGIES, Network, make_network

logger = logging.getLogger(__name__)

RUN_TIMEOUT_S = 900.0
ALLOWED = 1.15  # a W-th of one rank's time, and so much more


def main() -> None:
    """Run every network and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--mbit", nargs="+", type=float, default=[44, 400], help="Mbit/s of a link or a port")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], help="prefill ranks that ship together")
    parser.add_argument("--tokens", type=int, default=2048, help="of the request")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    if arguments.save and arguments.rounds < 5:
        parser.error(f"--rounds={arguments.rounds} is too few for a result that is kept; at least 5")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # namespaces are removed then too
    content = {
        **describe_run("kv_shipping"),
        "networks": [
            run_network(arguments, topology, mbit) for mbit in arguments.mbit for topology in arguments.topologies
        ],
    }
    print(json.dumps(content, indent=1))
    keep_result(content, arguments.save)


def run_network(arguments: argparse.Namespace, topology: str, mbit: float) -> dict[str, Any]:
    """Every number of ranks over one network; decode is behind the last prefill rank."""
    specification = {
        "ways": [1, *arguments.ranks],
        "rounds": [
            random.Random(index).sample([1, *arguments.ranks], 1 + len(arguments.ranks))
            for index in range(arguments.rounds + 1)  # the first one warms up
        ],
        "num_tokens": arguments.tokens,
        "layout": [arguments.layers, arguments.kv_heads, arguments.head_dim],
    }
    num_ranks = max(arguments.ranks)
    with make_network(num_ranks + 1, topology, mbit) as network, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "specification.json"
        path.write_text(json.dumps(specification | {"address": network.address(num_ranks)}))
        result = run_processes(network, path)
    alone = statistics.median(result["seconds"]["1"])
    ways = {}
    for way, seconds in result["seconds"].items():
        median = statistics.median(seconds)
        share = median / alone * int(way)
        ways[way] = {
            "seconds": median,
            "rounds_s": [round(value, 5) for value in seconds],
            "share_of_one_rank": round(median / alone, 4),
            "times_a_wth": round(share, 3),
            "met": share <= ALLOWED,
        }
        logger.info("%s %g Mbit/s, %s ranks: %.0f ms, %.2f / W of one rank's", topology, mbit, way, median * 1e3, share)
    return {
        "topology": topology,
        "mbit_per_s": mbit,
        "num_bytes": result["num_bytes"],
        "limit": "decode's one port: every rank's bytes pass it" if topology == "switch" else "each rank's own link",
        "share_of_rate": round(result["num_bytes"] * 8 / 1e6 / mbit / alone, 3),
        "ranks": ways,
    }


def run_processes(network: Network, specification: Path) -> dict[str, Any]:
    """What decode measured. Raises ``RuntimeError`` with the output of a process that failed."""
    env = os.environ | {
        "GLOO_SOCKET_IFNAME": network.interface,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    num_ranks = len(network.names) - 1
    processes, logs = [], []
    for rank in range(num_ranks + 1):
        words = [sys.executable, "-m", "benchmarks.kv_shipping_rank", str(rank), str(num_ranks), str(specification)]
        logs.append(specification.parent / f"rank-{rank}.log")
        with logs[-1].open("wb") as sink:
            processes.append(
                subprocess.Popen([*network.command(rank), *words], env=env, stdout=sink, stderr=subprocess.STDOUT)
            )
    try:
        wait_for(processes, logs)
    finally:
        for process in processes:
            process.kill()
    return json.loads((specification.parent / "result.json").read_text())


def wait_for(processes: Sequence["subprocess.Popen[bytes]"], logs: Sequence[Path]) -> None:
    """Until all have ended well; decode, the last one, ends first."""
    for process, log in reversed(list(zip(processes, logs, strict=True))):
        if process.wait(RUN_TIMEOUT_S):
            raise RuntimeError("\n".join(f"{each.name}: {each.read_text()[-1000:]}" for each in logs) + log.name)


if __name__ == "__main__":
    main()
