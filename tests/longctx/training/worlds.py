"""Whole trainings in tests: real ranks as processes (``tests/fork_server.py``).

What a rank runs is what the launchers run,
``longctx.training.rank.run_rank``, which they are tested with in ``test_train_launch.py``.
"""

import dataclasses
import json
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from longctx.config import compose
from longctx.training.config import TrainConfig
from longctx.training.gang import is_bad, settle
from longctx.training.launch import ADDRESS
from longctx.training.place import BODY, RankOrder, RankOutcome, find_port, make_places
from longctx.training.sinks.metrics_file import read_metrics
from tests.fork_server import FORKS, start_process

TIMEOUT_S = 120.0


def write_rows(path: Path, num_rows: int = 40, *, longest: int = 100) -> Path:
    """JSON lines of random words."""
    words = ["alpha", "beta", "gamma", "of", "and", "the", "sea", "stone"]
    random_ = random.Random(num_rows)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            text = " ".join(random_.choice(words) for _ in range(random_.randint(3, longest)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def make_config(output: Path, *overrides: str, model: str | Path = "demo") -> TrainConfig:
    """A small training in float32, as the command line would make it of ``overrides``."""
    data = output.parent / "rows.jsonl"
    if not data.exists():
        write_rows(data)
    small = [
        f"output={output}",
        f"model.path={model}",
        f"data.path={data}",
        "model.dtype=float32",
        "model.device=cpu",
        "train.num_steps=4",
        "train.context_length=64",
        "train.num_threads=1",
        "optimizer.lr=1e-3",
        "checkpoint.every=0",
        "logger.tensorboard=false",
        "logger.peak_flops=1e9",
        "parallel.timeout_s=30",
    ]
    return compose(TrainConfig, "train", [*small, *overrides])


def run_world(config: TrainConfig, *, body: str = BODY, restart: int = 0) -> dict[str, Any]:
    """Run all ranks once; returns rank 0's report, and raises as an attempt of the launchers does."""
    world_size = config.parallel.dp_degree * config.parallel.sp_degree
    places = make_places(["localhost"] * world_size, address=ADDRESS, port=find_port(ADDRESS), restart=restart)
    ranks = [_start(RankOrder(config, place, body)) for place in places]
    outcomes: dict[int, RankOutcome] = {}
    lost: dict[int, str] = {}
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while len(outcomes) + len(lost) < world_size and time.monotonic() < deadline:
            for rank, (process, connection) in enumerate(ranks):
                if rank in outcomes or rank in lost or not (connection.poll(0.01) or not process.is_alive()):
                    continue
                try:
                    outcomes[rank] = connection.recv()
                except EOFError:
                    lost[rank] = "was lost"
                if is_bad(outcomes.get(rank)):
                    deadline = min(deadline, time.monotonic() + 2.0)
    finally:
        for process, connection in ranks:
            process.kill()
            process.join()
            connection.close()
    assert outcomes or lost, f"no rank ended in {TIMEOUT_S} s"
    return settle(outcomes, lost)


def read_losses(output: Path) -> list[float]:
    """Of all steps, each of which is there once."""
    records = read_metrics(output)
    assert [each.step for each in records] == list(range(1, len(records) + 1))
    return [each.loss for each in records]


def change(config: TrainConfig, group: str, **fields: Any) -> TrainConfig:
    """The configuration with other values in one group."""
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **fields)})


def _start(order: RankOrder) -> tuple[Any, Connection]:
    connection, other = FORKS.Pipe(duplex=False)
    process = start_process(_run, order, other)
    other.close()
    return process, connection


def _run(order: RankOrder, connection: Connection) -> None:
    from longctx.training.rank import run_rank

    connection.send(run_rank(order))
