"""One prompt over the ranks of a worker against one rank: time to first token, time per token; prints JSON.

    python -m benchmarks.sharded_engine --ranks 2 --lengths 8192 --save sharded-engine

Every engine is a process tree of its own, one thread a rank, over the loopback interface; they take turns. ``one`` is
a single rank with one thread: with two ranks on two cores, half its time would be ideal. ``one-N`` is a single rank
with as many threads as the others have ranks, what a machine that is not shared would run. Weights are random.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.machine import describe_commit, describe_machine, describe_versions
from longctx.engine.build import build_engine, build_rank
from longctx.engine.config import EngineConfig
from longctx.engine.engine import Engine
from longctx.messages import GenerationRequest, SamplingParams
from longctx.models.config import ModelConfig
from longctx.shards.group import ShardGroup
from longctx.shards.plans import PlanChoice
from longctx.shards.runner import follow
from parallel.gloo_group import GlooGroup, open_meeting

LOOPBACK, TIMEOUT_S = "127.0.0.1", 300.0
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the rounds and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="110m")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--plans", nargs="+", default=["auto"], help="exchange plans of prompts")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--outputs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-bytes", default="1GiB", help="of each rank")
    parser.add_argument("--work", type=Path, default=Path("/tmp/longctx-bench"))
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    options = parser.parse_args()
    if options.save and options.rounds < 5:
        parser.error(f"--rounds={options.rounds} is not allowed with --save: at least 5")
    result = {
        "benchmark": "sharded_engine",
        **describe_commit(),
        "hardware": describe_machine(),
        "versions": describe_versions(),
        "settings": {name: str(value) for name, value in vars(options).items()},
        "engines": measure(options),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.save:
        (RESULTS / f"{options.save}.json").write_text(text + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Medians by engine and length, with the ratio to one rank of one thread, round by round."""
    folder = str(ensure_checkpoint(options.model, options.work))
    choices = {"one": (1, 1, "auto")} | {f"one-{n}": (1, n, "auto") for n in options.ranks}
    choices |= {f"{n}-{plan}": (n, 1, plan) for n in options.ranks for plan in options.plans}
    pipes = {name: start_engine(folder, options.kv_bytes, *choice) for name, choice in choices.items()}
    for pipe in pipes.values():
        pipe.recv()
    samples: dict[tuple[str, int], list[tuple[float, float]]] = {}
    rng = random.Random(0)
    for round_idx in range(options.rounds + 1):
        for length in options.lengths:
            prompt = [rng.randrange(10, SHAPES[options.model].vocab_size) for _ in range(length)]
            for name in rng.sample(list(pipes), len(pipes)):
                pipes[name].send((prompt, options.outputs))
                times = pipes[name].recv()
                if round_idx:  # the first warms up
                    samples.setdefault((name, length), []).append(times)
    for pipe in pipes.values():
        pipe.send(None)
    return {name: {str(n): summarise(samples[name, n], samples["one", n]) for n in options.lengths} for name in pipes}


def summarise(own: list[tuple[float, float]], one: list[tuple[float, float]]) -> dict[str, float]:
    """Medians, and of the rounds' ratios to one rank."""
    return {
        "ttft_s": round(statistics.median(ttft for ttft, _ in own), 3),
        "tpot_ms": round(statistics.median(tpot for _, tpot in own) * 1e3, 2),
        "ttft_speedup": round(statistics.median(b[0] / a[0] for a, b in zip(own, one, strict=True)), 3),
        "tpot_ratio": round(statistics.median(a[1] / b[1] for a, b in zip(own, one, strict=True)), 3),
    }


def start_engine(folder: str, kv_bytes: str, num_ranks: int, num_threads: int, plan: str) -> Connection:
    """A pipe to rank 0 of an engine in processes of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    meeting = open_meeting(LOOPBACK, timeout_s=TIMEOUT_S) if num_ranks > 1 else None
    _kept.append(meeting)
    for rank in range(num_ranks):
        place = (LOOPBACK, meeting.port) if meeting else None
        arguments = (folder, kv_bytes, rank, num_ranks, num_threads, plan, place, there if rank == 0 else None)
        context.Process(target=serve_rank, args=arguments, daemon=True).start()
    return here


_kept: list[Any] = []  # meetings live as long as the groups


def serve_rank(
    folder: str,
    kv_bytes: str,
    rank: int,
    num_ranks: int,
    num_threads: int,
    plan: str,
    place: tuple[str, int] | None,
    pipe: Connection | None,
) -> None:
    """One rank's process."""
    model = ModelConfig(path=folder, device="cpu")
    config = EngineConfig(num_threads=num_threads, kv_bytes=kv_bytes, prefix_cache=False)
    shards = None
    if place is not None:
        group = GlooGroup(rank, num_ranks, meeting=place, address=LOOPBACK, timeout_s=TIMEOUT_S)
        shards = ShardGroup(group, f"rank {rank}", PlanChoice(plan), TIMEOUT_S)
    if rank and shards is not None:
        follow(build_rank(model, config, shards), shards.group, timeout_s=TIMEOUT_S)
        return
    engine = build_engine(model, config, shards=shards)
    assert pipe is not None
    pipe.send("ready")
    while True:
        while not pipe.poll(1.0):
            engine.keep_alive()
        work = pipe.recv()
        if work is None:
            engine.close()
            return
        pipe.send(generate(engine, *work))


def generate(engine: Engine, prompt: list[int], num_outputs: int) -> tuple[float, float]:
    """Seconds to the first token, and per token from then on."""
    params = SamplingParams(temperature=0, max_tokens=num_outputs, ignore_eos=True)
    engine.add(GenerationRequest("r", tuple(prompt), params))
    begun = time.perf_counter()
    times: list[float] = []
    while engine.has_work:
        num_tokens = len(engine.step())
        times += [time.perf_counter()] * num_tokens
    return times[0] - begun, (times[-1] - times[0]) / (len(times) - 1)


if __name__ == "__main__":
    main()
