"""Random requests under random faults, every answer compared with what one engine says alone.

    python -m tests.cluster.soak --requests 10000 --seed 0 --save soak

Workers are processes of their own, without Ray; they are killed, frozen and thawed, and started anew, while requests of
all lengths come, some of which leave again. An answer is exact, or a typed error; one worker of each role is spared,
so errors should be few. In the end nothing may be left: no page, no request, no socket, no shared memory.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.config import ServeConfig
from longctx.errors import LongctxError
from longctx.messages import GenerationRequest, OutputDelta, SamplingParams
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

LONGEST_S = 120.0  # that any request may take: more is a hang
PREFIX = 96  # tokens that a third of the prompts share
LEAVE_SHARE = 0.05  # of the clients leave before the end


@dataclass
class Outcome:
    """What became of the requests."""

    counts: Counter[str] = field(default_factory=Counter)  # exact, left, or an error's type
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)  # texts
    num_faults: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # of exact answers


def draw_requests(seed: int, count: int) -> list[GenerationRequest]:
    """Prompts of 1 to 500 tokens, some with a common prefix; greedy and seeded; one or two sequences."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        length = rng.choice((rng.randint(1, 40), rng.randint(1, 200), rng.randint(100, 500)))
        prompt = make_prompt(1000 * seed + number, length)
        if number % 3 == 0:
            prompt = make_prompt(seed, PREFIX) + prompt
        params = SamplingParams(
            temperature=rng.choice((0.0, 0.0, 1.0)),
            seed=rng.randrange(1 << 30),
            n=rng.choice((1, 1, 1, 2)),
            max_tokens=rng.choice((1, rng.randint(2, 20), rng.randint(20, 120))),
            ignore_eos=True,
        )
        requests.append(make_request(f"r{number}", prompt, params))
    return requests


async def ask(
    cluster: SmallCluster, request: GenerationRequest, expected: Sequence[OutputDelta], outcome: Outcome, rng
):
    """Send one request and compare."""
    leaves = rng.random() < LEAVE_SHARE
    begun, deltas = time.monotonic(), []
    num_wanted = rng.randint(0, 20) if leaves else 1 << 30
    stream = cluster.router.submit(request)
    try:
        async with asyncio.timeout(LONGEST_S):
            async for new in stream:
                deltas += new
                if sum(len(delta.token_ids) for delta in deltas) > num_wanted:
                    break
    except TimeoutError:
        outcome.counts["hang"] += 1
        return
    except LongctxError as error:
        outcome.counts[type(error).__name__] += 1
        outcome.errors[str(error)[:160]] += 1
    finally:
        await stream.aclose()
    got = {delta.index: list(delta.token_ids) for delta in join(deltas)} if deltas else {}
    is_whole = sum(delta.finish_reason is not None for delta in deltas) == request.sampling.n
    failed = [delta.error for delta in deltas if delta.finish_reason == "error"]
    alone = {delta.index: list(delta.token_ids) for delta in expected}
    if any(alone[index][: len(tokens)] != tokens for index, tokens in got.items()) or (
        is_whole and not failed and got != alone
    ):
        outcome.counts["wrong"] += 1
        outcome.wrong.append(f"{request.request_id}: {got} instead of {alone}")
    elif failed:
        outcome.counts["error in the stream"] += 1
        outcome.errors[str(failed[0])[:160]] += 1
    elif is_whole:
        outcome.counts["exact"] += 1
        outcome.seconds.append(time.monotonic() - begun)
    elif leaves:
        outcome.counts["left"] += 1


async def strike(processes: dict[str, ProcessHandle], outcome: Outcome, rng: random.Random, mean_s: float) -> None:
    """Faults without end, at random moments; the first worker of each role is spared."""
    while True:
        await asyncio.sleep(rng.expovariate(1 / mean_s))
        process = processes[rng.choice(sorted(processes))]
        fault = rng.choice(("kill", "freeze", "blink"))
        outcome.num_faults[fault] += 1
        if fault == "kill":
            process.kill()
            await asyncio.sleep(rng.uniform(0.0, 2.0))
            await process.restart()
        else:
            process.freeze()
            await asyncio.sleep(rng.uniform(2.5, 5.0) if fault == "freeze" else rng.uniform(0.05, 1.0))
            process.thaw()


@asynccontextmanager
async def open_fleet(config: ServeConfig) -> AsyncIterator[tuple[SmallCluster, dict[str, ProcessHandle]]]:
    """A router in this process, every worker in one of its own."""
    async with AsyncExitStack() as stack:
        processes = {
            name: await stack.enter_async_context(open_worker(name, role, config))
            for name, role in worker_names(config)
        }
        yield await stack.enter_async_context(start_cluster(config, *processes.values())), processes


async def run(
    config: ServeConfig, requests: Sequence[GenerationRequest], expected: Sequence[Sequence[OutputDelta]], options: Any
) -> tuple[Outcome, dict[str, Any]]:
    """Send ``options.requests`` requests, ``options.concurrency`` at one time."""
    rng, outcome = random.Random(options.seed), Outcome()
    async with open_fleet(config) as (cluster, processes):
        before = {name: count_held(process) for name, process in processes.items()}
        own_before = len(os.listdir("/proc/self/fd"))
        spared = {"prefill-0", "decode-0"}
        victims = {name: process for name, process in processes.items() if name not in spared}
        striking = asyncio.create_task(strike(victims, outcome, random.Random(options.seed + 1), options.fault_every_s))
        places = asyncio.Semaphore(options.concurrency)

        async def send(number: int) -> None:
            index = rng.randrange(len(requests))
            try:
                request = replace(requests[index], request_id=f"q{number}")
                await ask(cluster, request, expected[index], outcome, rng)
            finally:
                places.release()

        tasks = set()
        for number in range(options.requests):
            await places.acquire()
            task = asyncio.create_task(send(number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if number % 500 == 499:
                logger.info("%d sent: %s, faults %s", number + 1, dict(outcome.counts), dict(outcome.num_faults))
        await asyncio.gather(*tasks)
        striking.cancel()
        with suppress(asyncio.CancelledError):
            await striking
        for process in victims.values():
            process.thaw()
            if not process.is_alive:
                await process.restart()
        left = await find_leaks(cluster, processes, before)
        own_after = len(os.listdir("/proc/self/fd"))
        if own_after > own_before + 4 * len(victims):
            left["router"] = {"file descriptors": (own_before, own_after)}
        return outcome, left


async def find_leaks(
    cluster: SmallCluster, processes: dict[str, ProcessHandle], before: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """What is still held when everybody has left: nothing, within a while."""

    async def is_idle() -> bool:
        stats = await cluster.router.worker_stats()
        return all(each.alive and not each.engine.num_pages_used and not each.engine.num_running for each in stats)

    left: dict[str, Any] = {}
    try:
        await wait_until(is_idle, 30.0)
    except TimeoutError:
        left["workers"] = [
            (each.name, each.alive, each.engine.num_pages_used, each.engine.num_running, each.engine.num_waiting)
            for each in await cluster.router.worker_stats()
        ]
    if cluster.router._flights:
        left["flights"] = sorted(cluster.router._flights)
    await asyncio.sleep(1.0)  # links that nobody uses close
    for name in ("prefill-0", "decode-0"):  # the others were started anew
        now = count_held(processes[name])
        grown = {what: (before[name][what], now[what]) for what in now if now[what] > before[name][what] + 24}
        if grown:
            left[name] = grown
    return left


def count_held(process: ProcessHandle) -> dict[str, int]:
    """File descriptors, threads and shared memory of a worker's process."""
    folder = Path(f"/proc/{process.pid}")
    return {
        "file descriptors": len(os.listdir(folder / "fd")),
        "threads": len(os.listdir(folder / "task")),
        "shared segments": sum("/dev/shm/" in line for line in (folder / "maps").read_text().splitlines()),
    }


def soak(options: Any) -> dict[str, Any]:
    """Everything; what ``main`` prints."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder) / "llama", "llama", max_position_embeddings=8192)
        config = make_config(
            checkpoint,
            transport=options.transport,
            num_prefill=options.prefill,
            num_decode=options.decode,
            policy=options.policy,
            worker_timeout_s=1.5,
            recovery_timeout_s=30.0,
            kv_bytes="2MiB",
            max_waiting=512,
        )
        requests = draw_requests(options.seed, options.distinct)
        expected = generate_alone(config, requests)
        begun = time.monotonic()
        outcome, left = asyncio.run(run(config, requests, expected, options))
    seconds = sorted(outcome.seconds) or [0.0]
    num_whole = sum(outcome.counts.values()) - outcome.counts["left"]
    return {
        "options": vars(options),
        "seconds": round(time.monotonic() - begun, 1),
        "counts": dict(outcome.counts),
        "share_exact": outcome.counts["exact"] / max(1, num_whole),
        "faults": dict(outcome.num_faults),
        "answer_s": {
            f"p{percent}": round(seconds[int(percent / 100 * (len(seconds) - 1))], 3) for percent in (50, 99, 100)
        },
        "errors": dict(outcome.errors),
        "wrong": outcome.wrong[:10],
        "left": left,
    }


def main() -> int:
    """Run it; 0 if no answer was wrong, none hung and nothing is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--distinct", type=int, default=200, help="different requests, each asked many times")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--fault-every-s", type=float, default=2.0)
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--policy", default="splitwise")
    parser.add_argument("--transport", default="tcp", choices=("tcp", "shared_memory"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    for noisy in ("cluster", "memory", "longctx"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    result = soak(options)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if options.save:
        from benchmarks.machine import describe_run, keep_result

        keep_result(describe_run("soak") | result, options.save)
    return int(bool(result["wrong"] or result["counts"].get("hang") or result["left"]))


if __name__ == "__main__":
    sys.exit(main())
