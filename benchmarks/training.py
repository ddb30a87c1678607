"""Training against transformers + accelerate + DeepSpeed Ulysses, and plain DDP: tokens a second and peak memory.

    python -m benchmarks.training --models tiny --lengths 4096 16384 65536 --save training

Two ranks of one thread each for every engine, the same checkpoint, tokens, element type and optimizer. Ranks of longctx
have the heap settings that it starts them with (train.compact_heap) and, as longctx-loose-heap, the C library's own,
which all peers have; with --peers-heap the peers have longctx's, too: it saves them memory and costs them time. Engines
stay up and take turns step by step, each round in another order; one step of each warms up. DDP's ranks share no
sequence, so it takes two in a step: its tokens count twice.
"""

import argparse
import json
import logging
import random
import socket
import statistics
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.machine import REPOSITORY, describe_run, keep_result
from benchmarks.processes import ProcessTree
from longctx.heap import heap_env

logger = logging.getLogger(__name__)

END_ID = 300
PEERS = ("deepspeed-ulysses", "ddp")
ENGINES = ("longctx", "longctx-loose-heap", *PEERS)


class Engine:
    """The ranks of one engine."""

    def __init__(self, name: str, specification: dict[str, Any], folder: Path, env: dict[str, str]) -> None:
        self.name, self.seconds, self.losses, self.error = name, [], [], ""
        self.memory_bytes = 0
        with socket.create_server(("127.0.0.1", 0)) as probe:
            specification = specification | {"port": probe.getsockname()[1], "output": str(folder / name)}
        path = folder / f"{name}.json"
        path.write_text(json.dumps(specification))
        self._ranks = [
            ProcessTree(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.training_rank",
                    name.removesuffix("-loose-heap"),
                    str(rank),
                    str(path),
                ],
                folder / f"{name}-{rank}.log",
                env=env | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"},
                cwd=REPOSITORY,
                piped=True,
            )
            for rank in range(specification["world_size"])
        ]
        self._read()

    def step(self) -> None:
        """One step of all ranks; the slowest counts."""
        if self.error:
            return
        for rank in self._ranks:
            assert rank.process.stdin is not None
            rank.process.stdin.write("step\n")
            rank.process.stdin.flush()
        records = self._read()
        if records:
            self.seconds.append(max(record["seconds"] for record in records))
            self.losses.append(statistics.mean(record["loss"] for record in records))
            self.memory_bytes = max(self.memory_bytes, *(record["memory_bytes"] for record in records))

    def close(self) -> None:
        """End the ranks."""
        for rank in self._ranks:
            rank.process.kill()
            rank.process.wait()

    def _read(self) -> list[dict[str, Any]]:
        records = []
        for rank in self._ranks:
            assert rank.process.stdout is not None
            line = rank.process.stdout.readline()
            record = json.loads(line) if line else {"error": rank.log_tail()}
            if "error" in record:
                self.error = record["error"]
                return []
            records.append(record)
        return records


def add_end_token(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with a token that ends texts, which the ones for serving do without."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text()) | {"eos_token": f"\u0120w{END_ID}"}
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def measure(arguments: argparse.Namespace, model: str, length: int, folder: Path) -> dict[str, Any]:
    """One model at one length."""
    run_folder = folder / f"{model}-{length}"
    run_folder.mkdir()
    data = run_folder / "rows.jsonl"
    letters = random.Random(length)
    with data.open("w") as file:
        for _ in range(2 * (arguments.rounds + 2)):
            text = "".join(letters.choices(string.ascii_lowercase, k=length - 1))  # a letter is a token, as is the end
            file.write(json.dumps({"text": text}) + "\n")
    specification = {
        "world_size": 2,
        "model": str(add_end_token(ensure_checkpoint(model, Path(arguments.work)), run_folder / "model")),
        "end_id": END_ID,
        "data": str(data),
        "num_tokens": length,
        "dtype": arguments.dtype,
        "zero_stage": arguments.zero_stage,
        "train": {"mlp_tile": arguments.mlp_tile},
    }
    compact = ("longctx", *PEERS) if arguments.peers_heap else ("longctx",)
    engines = [Engine(name, specification, run_folder, heap_env(name in compact)) for name in arguments.engines]
    try:
        for turn in range(arguments.rounds + 1):  # the first warms up
            for engine in random.Random(turn).sample(engines, len(engines)):
                engine.step()
    finally:
        for engine in engines:
            engine.close()
    described = {engine.name: _describe(engine, length) for engine in engines}
    for name, each in described.items():
        for own, ours in described.items():
            if name in PEERS and own not in PEERS and "tokens_per_s" in each and "tokens_per_s" in ours:
                each[f"{own}_tokens_ratio"] = ours["tokens_per_s"] / each["tokens_per_s"]
                each[f"{own}_memory_ratio"] = ours["peak_memory_bytes"] / each["peak_memory_bytes"]
        logger.info("%s, %d tokens, %s: %s", model, length, name, each)
    return {"model": model, "num_tokens": length, "engines": described}


def _describe(engine: Engine, length: int) -> dict[str, Any]:
    timed = engine.seconds[1:]
    if engine.error or not timed:
        return {"error": engine.error}
    num_tokens = length * (2 if engine.name == "ddp" else 1)
    return {
        "tokens_per_s": num_tokens / statistics.median(timed),
        "rounds_s": [round(each, 4) for each in timed],
        "peak_memory_bytes": engine.memory_bytes,
        "losses": [round(each, 5) for each in engine.losses],
    }


def main() -> None:
    """Run the grid and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny"], choices=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--peers-heap", action="store_true", help="peers, too, have longctx's heap settings")
    parser.add_argument("--mlp-tile", type=int, default=0)
    parser.add_argument("--work", default="/tmp/longctx-bench", help="folder for checkpoints")
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with tempfile.TemporaryDirectory() as folder:
        cells = [
            measure(arguments, model, length, Path(folder))
            for model in arguments.models
            for length in arguments.lengths
        ]
    content = {
        **describe_run("training"),
        "settings": {key: value for key, value in vars(arguments).items() if key != "save"},
        "cells": cells,
    }
    print(json.dumps(content, indent=1))
    keep_result(content, arguments.save)


if __name__ == "__main__":
    main()
