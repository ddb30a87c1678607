"""Every fault at every point of the protocol in either role: what clients get, and how long they wait for it.

    python -m tests.cluster.fault_matrix --save fault-matrix

Two prefill and two decode workers, each a process of its own, without Ray. One of them is killed (SIGKILL), frozen
(SIGSTOP) or cut off at one point of a request's way (``fault_points.py``), while other requests run. All answers must
be those that come without a fault; the worker comes back, and in the end nothing is held.
"""

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.config import ServeConfig
from longctx.messages import GenerationRequest, OutputDelta, SamplingParams
from tests.cluster.fault_points import FAULTS, POINTS, FaultOrder
from tests.cluster.small_cluster import (
    SmallCluster,
    generate_alone,
    join,
    make_config,
    make_prompt,
    start_cluster,
    wait_until,
    worker_names,
)
from tests.cluster.worker_process import ProcessHandle, open_worker
from tests.longctx.engines import make_request
from tests.tiny_checkpoints import make_checkpoint

logger = logging.getLogger(__name__)

TIMEOUT_S = 0.75  # worker_timeout_s: lost a second after the last sign of life, with the heartbeat
DOWN_S = 4.0  # that a frozen or cut worker stays away
Cell = tuple[str, str, str]  # role, point, fault


def all_cells() -> list[Cell]:
    """Every role, point and fault."""
    return [(role, point, fault) for role, point in POINTS for fault in FAULTS]


def make_fleet_config(folder: Path, *, transport: str, policy: str) -> ServeConfig:
    """Small steps, so that a prompt takes many frames."""
    return make_config(
        folder,
        transport=transport,
        policy=policy,
        num_prefill=2,
        num_decode=2,
        max_batch_tokens=64,
        worker_timeout_s=TIMEOUT_S,
        recovery_timeout_s=20.0,
        lease_ttl_s=2.0,
        send_timeout_s=1.0,
        connect_timeout_s=1.0,
    )


def make_requests() -> list[GenerationRequest]:
    """Greedy and seeded; the first ones meet both workers of each role."""
    greedy = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
    seeded = replace(greedy, temperature=1.0, seed=11)
    return [make_request(f"r{n}", make_prompt(n, 300 + 40 * n), seeded if n % 2 else greedy) for n in range(6)]


async def run_cell(
    cell: Cell, config: ServeConfig, requests: Sequence[GenerationRequest], expected: Sequence[Sequence[OutputDelta]]
) -> dict[str, Any]:
    """One fault."""
    role, point, fault = cell
    victim = f"{role}-0"
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "hit"
        order = FaultOrder(role, point, fault, DOWN_S, str(mark))
        async with AsyncExitStack() as stack:
            processes = {
                name: await stack.enter_async_context(
                    open_worker(name, worker_role, config, order if name == victim else None)
                )
                for name, worker_role in worker_names(config)
            }
            cluster = await stack.enter_async_context(start_cluster(config, *processes.values()))
            watching = asyncio.create_task(watch(cluster, processes[victim], mark, fault))
            answers = await asyncio.gather(*(ask(cluster, request) for request in requests))
            finished_s = time.time()
            hit_s, lost_s = await watching
            result = describe(cell, answers, expected)
            result["detected_s"] = None if lost_s is None else round(lost_s - hit_s, 2)
            result["finished_s"] = round(max(0.0, finished_s - hit_s), 2)
            result["held"] = await find_held(cluster)
    return result


async def ask(cluster: SmallCluster, request: GenerationRequest) -> list[OutputDelta] | Exception:
    """The answer, or what was raised."""
    try:
        return join(await cluster.generate(request))
    except Exception as error:
        return error


async def watch(cluster: SmallCluster, process: ProcessHandle, mark: Path, fault: str) -> tuple[float, float | None]:
    """Bring the victim back; when it was hit, and when the router noticed (None: it did not)."""
    await wait_until(mark.exists)
    hit_s, lost_s = mark.stat().st_mtime, None
    while time.time() < hit_s + DOWN_S:
        health = await cluster.router.health()
        if lost_s is None and any(each.name == process.name and not each.ready for each in health.workers):
            lost_s = time.time()
        await asyncio.sleep(0.01)
    if fault == "kill":
        await process.restart()
    elif fault == "freeze":
        process.thaw()
    return hit_s, lost_s


def describe(cell: Cell, answers: Sequence[Any], expected: Sequence[Sequence[OutputDelta]]) -> dict[str, Any]:
    """How many answers are exact, and what is wrong with the others."""
    result: dict[str, Any] = dict(zip(("role", "point", "fault"), cell, strict=True))
    wrong = []
    for number, (answer, alone) in enumerate(zip(answers, expected, strict=True)):
        if isinstance(answer, Exception):
            wrong.append(f"r{number}: {type(answer).__name__}: {answer}")
        elif [delta.token_ids for delta in answer] != [delta.token_ids for delta in alone]:
            wrong.append(f"r{number}: wrong tokens")
    return result | {"exact": len(answers) - len(wrong), "of": len(answers), "wrong": wrong}


async def find_held(cluster: SmallCluster) -> str:
    """What is still held when all have been answered and the victim is back; empty if nothing."""

    async def is_free() -> bool:
        stats = await cluster.router.worker_stats()
        return all(each.alive and not each.engine.num_pages_used and not each.engine.num_running for each in stats)

    try:
        await wait_until(is_free, 15.0)
    except TimeoutError:
        return str([(each.name, each.alive, each.engine) for each in await cluster.router.worker_stats()])
    return ""


def run_cells(cells: Sequence[Cell], *, transport: str = "tcp", policy: str = "splitwise") -> Iterator[dict[str, Any]]:
    """One result after the other."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder) / "llama", "llama", max_position_embeddings=8192)
        config = make_fleet_config(checkpoint, transport=transport, policy=policy)
        requests = make_requests()
        expected = generate_alone(config, requests)
        for cell in cells:
            yield asyncio.run(run_cell(cell, config, requests, expected))


def is_good(result: dict[str, Any]) -> bool:
    """Whether nobody noticed anything but time."""
    return result["exact"] == result["of"] and not result["wrong"] and not result["held"]


def report(name: str, options: argparse.Namespace, results: Sequence[dict[str, Any]]) -> int:
    """Print all results, keep them if ``options.save`` says so; 0 if every cell is good."""
    content = {"options": vars(options), "cells": results, "num_good": sum(map(is_good, results))}
    sys.stdout.write(json.dumps(content, indent=1) + "\n")
    if options.save:
        from benchmarks.machine import describe_run, keep_result

        keep_result(describe_run(name) | content, options.save)
    return int(content["num_good"] < len(results))


def main() -> int:
    """Run the matrix; 0 if every cell is good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, help="so many, drawn; all without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transport", default="tcp", choices=("tcp", "shared_memory"))
    parser.add_argument("--policy", default="splitwise")
    parser.add_argument("--only", help="cells whose 'role, point, fault' has this")
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for noisy in ("cluster", "memory", "longctx"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    cells = [cell for cell in all_cells() if not options.only or options.only in ", ".join(cell)]
    if options.cells is not None:
        cells = random.Random(options.seed).sample(cells, options.cells)
    results = []
    for result in run_cells(cells, transport=options.transport, policy=options.policy):
        results.append(result)
        logger.info("%s %s", "good" if is_good(result) else "BAD", result)
    return report("fault_matrix", options, results)


if __name__ == "__main__":
    sys.exit(main())
