"""Sequence parallel attention over four ranks in network namespaces: every plan, ``auto`` and the public peers.

    python -m benchmarks.sequence_parallel --mbit 400 --save sequence-parallel-400

Needs root. Each rank is a process with one thread in a namespace of its own; links are slowed down with ``tc``. In one
run all engines take turns, each round in another order; a time is the slowest rank's. Reported are medians over rounds.
"""

import argparse
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.hidden_communication import describe_hidden
from benchmarks.machine import REPOSITORY, describe_run, describe_versions, keep_result
from benchmarks.networks import TOPOLOGIES, Network, make_network
from parallel.plans import PLANS

logger = logging.getLogger(__name__)

PEER_PYTHON = "LONGCTX_BENCH_SP_PYTHON"
PEER_NAMES = ("ring-attention-pytorch", "deepspeed-ulysses", "torch-ring")
MASKS = ("full", "causal", "packed")
RUN_TIMEOUT_S = 3600.0
SHORT = 16  # queries are this many times fewer than keys in a short cell


def main() -> None:
    """Run the grid and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=4)
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--mbit", nargs="+", type=float, default=[44, 400], help="Mbit/s of a rank's links")
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4, 8], help="query heads per KV head")
    parser.add_argument("--queries", nargs="+", default=["long", "short"], choices=("long", "short"))
    parser.add_argument("--tokens", type=int, default=1024, help="of each rank")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", default=["auto", *PLANS, *PEER_NAMES])
    parser.add_argument("--least-s", type=float, default=0.0, help="a cell over sooner gets more rounds, up to 5 times")
    parser.add_argument("--hidden", nargs="*", default=["token_ring", "auto"], help="whose hidden communication counts")
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    if arguments.save and arguments.rounds < 5:
        parser.error(f"--rounds={arguments.rounds} is too few for a result that is kept; at least 5")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # namespaces are removed then too
    content = {
        **describe_run("sequence_parallel"),
        "versions": describe_versions() | _peer_versions(),
        "world_size": arguments.world_size,
        "networks": [
            run_network(arguments, topology, mbit) for mbit, topology in product(arguments.mbit, arguments.topologies)
        ],
    }
    print(json.dumps(content, indent=1))
    keep_result(content, arguments.save)


def run_network(arguments: argparse.Namespace, topology: str, mbit: float) -> dict[str, Any]:
    """Every cell over one network."""
    num_tokens = arguments.tokens * arguments.world_size
    cells = [
        {
            "mask": mask,
            "num_tokens": num_tokens,
            "num_q": num_tokens if queries == "long" else num_tokens // SHORT,
            "num_heads": arguments.heads,
            "num_kv_heads": arguments.heads // group,
            "head_dim": arguments.head_dim,
        }
        for mask, queries, group in product(arguments.masks, arguments.queries, arguments.groups)
    ]
    specification = {
        "world_size": arguments.world_size,
        "cells": cells,
        "engines": arguments.engines,
        "rounds": arguments.rounds,
        "least_s": arguments.least_s,
        "hidden": arguments.hidden,
    }
    with make_network(arguments.world_size, topology, mbit) as network, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "specification.json"
        path.write_text(json.dumps(specification))
        ranks = run_ranks(network, path)
    described = [join_ranks([rank["cells"][index] for rank in ranks]) for index in range(len(cells))]
    for cell in described:
        _log(topology, mbit, cell)
    return {
        "topology": topology,
        "mbit_per_s": mbit,
        "measured_links": ranks[0]["links"],
        "all_at_once": ranks[0]["all_at_once"],
        "cells": described,
    }


def run_ranks(network: Network, specification: Path) -> list[dict[str, Any]]:
    """What each rank wrote, one in each namespace. Raises ``RuntimeError`` with the output of one that failed."""
    python = os.environ.get(PEER_PYTHON, sys.executable)
    env = os.environ | {
        "GLOO_SOCKET_IFNAME": network.interface,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONWARNINGS": "ignore",
    }
    logs = [specification.parent / f"rank-{rank}.log" for rank in range(len(network.names))]
    processes = []
    for rank, log in enumerate(logs):
        words = [*network.command(rank), python, "-m", "benchmarks.attention_rank", str(rank), str(specification)]
        with log.open("wb") as sink:
            processes.append(subprocess.Popen(words, env=env, stdout=sink, stderr=subprocess.STDOUT))
    try:
        for process, log in zip(processes, logs, strict=True):
            if process.wait(RUN_TIMEOUT_S):
                raise RuntimeError(f"{log.name}: {log.read_text()[-2000:]}")
    finally:
        for process in processes:
            process.kill()
    return [json.loads((specification.parent / f"rank-{rank}.json").read_text()) for rank in range(len(logs))]


def join_ranks(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One cell: times are equal on all ranks; of the bytes, the sum and the busiest rank's."""
    engines: dict[str, Any] = {}
    for name, first in ranks[0]["engines"].items():
        records = [rank["engines"][name] for rank in ranks]
        engine = {key: first[key] for key in ("plan", "error", "correct", "predicted_compute_s") if key in first}
        for direction in ("forward", "backward"):
            seconds = first[f"{direction}_s"]
            sent = [statistics.median(record[f"{direction}_bytes"]) for record in records]
            engine[direction] = {
                "seconds": statistics.median(seconds),
                "rounds_s": [round(value, 5) for value in seconds],
                "sent_bytes": sum(sent),
                "busiest_sent_bytes": max(sent),
            }
            if "plan" in first:
                planned = [record[f"planned_{direction}_bytes"] for record in records]
                engine[direction] |= {
                    "planned_bytes": sum(planned),
                    "busiest_planned_bytes": max(planned),
                    "predicted_s": first[f"predicted_{direction}_s"],
                }
        engine["seconds"] = engine["forward"]["seconds"] + engine["backward"]["seconds"]
        engines[name] = engine
    hidden = {name: describe_hidden([rank["hidden"][name] for rank in ranks]) for name in ranks[0]["hidden"]}
    return {"cell": ranks[0]["cell"], "skipped": ranks[0]["skipped"], "engines": engines, "hidden": hidden}


def _peer_versions() -> dict[str, str | None]:
    if PEER_PYTHON not in os.environ:
        return {}
    script = "import importlib.metadata as m; print(m.version('ring-attention-pytorch'), m.version('deepspeed'))"
    done = subprocess.run([os.environ[PEER_PYTHON], "-c", script], capture_output=True, text=True, check=True)
    ring, deepspeed = done.stdout.split()
    return {"ring-attention-pytorch": ring, "deepspeed": deepspeed}


def _log(topology: str, mbit: float, cell: dict[str, Any]) -> None:
    shape = cell["cell"]
    queries = "short" if shape["num_q"] < shape["num_tokens"] else "long"
    logger.info(
        "%s %g Mbit/s, %s, g=%d, %s",
        topology,
        mbit,
        shape["mask"],
        shape["num_heads"] // shape["num_kv_heads"],
        queries,
    )
    for name, engine in sorted(cell["engines"].items(), key=lambda item: item[1]["seconds"]):
        logger.info(
            "  %-24s forward %7.1f ms  backward %7.1f ms  sent %6.2f MB%s%s",
            name,
            engine["forward"]["seconds"] * 1e3,
            engine["backward"]["seconds"] * 1e3,
            (engine["forward"]["sent_bytes"] + engine["backward"]["sent_bytes"]) / 1e6,
            f"  ({engine['plan']})" if name == "auto" else "",
            "" if engine["correct"] else f"  WRONG: error {engine['error']:.1e}",
        )
    for name, hidden in cell["hidden"].items():
        logger.info("  %-24s hides %s of what it could hide (%s)", name, hidden["hidden"], hidden["plan"])


if __name__ == "__main__":
    main()
