"""What ranks run in the tests of their launchers, in place of the trainer: real ranks that come to the ends asked for.

A test writes into ``output/acts.json`` what which rank does in which attempt; each rank writes what it saw.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from longctx.errors import CheckpointError, LongctxError
from longctx.training.config import ParallelConfig, TrainClusterConfig, TrainConfig, TrainLoopConfig
from longctx.training.place import RankPlace
from longctx.training.stop import is_stop_requested

BODY = "tests.longctx.gang_body:train_rank"
WAIT_S = 60.0


class NotFiniteError(LongctxError):
    """As the trainer's own errors are."""


def make_config(
    folder: Path, *, dp_degree: int = 1, sp_degree: int = 1, acts: list[dict[str, Any]] | None = None, **cluster: Any
) -> TrainConfig:
    """``acts``: of ``rank``, which does ``act`` in attempt ``restart`` (0 if left out); ``cluster``: fields of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "acts.json").write_text(json.dumps(acts or []))
    return TrainConfig(
        output=str(folder),
        parallel=ParallelConfig(dp_degree=dp_degree, sp_degree=sp_degree),
        train=TrainLoopConfig(batch_size=dp_degree, num_threads=1),
        cluster=TrainClusterConfig(**cluster),
    )


def train_rank(config: TrainConfig, place: RankPlace) -> dict[str, Any]:
    """See the module."""
    folder = Path(config.output)
    seen = dataclasses.asdict(place) | {
        "pid": os.getpid(),
        "threads": os.environ["OMP_NUM_THREADS"],
        "rank": os.environ["RANK"],
        "torch": "torch" in sys.modules,
    }
    write(folder / f"seen-{place.restart}-{place.global_rank}.json", seen)
    for act in json.loads((folder / "acts.json").read_text()):
        if (act["rank"], act.get("restart", 0)) == (place.global_rank, place.restart):
            ACTS[act["act"]](folder, place)
    return {"rank": place.global_rank, "restart": place.restart, "loss": 0.5, "stopped": is_stop_requested()}


def write(path: Path, value: Any) -> None:
    """As a whole or not at all."""
    path.with_suffix(".part").write_text(json.dumps(value))
    path.with_suffix(".part").rename(path)


def read_seen(folder: Path, restart: int = 0) -> list[dict[str, Any]]:
    """What the ranks of one attempt saw, in rank order."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"seen-{restart}-*.json"))]


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(*_: Any) -> None:
    sys.stderr.write("the last words\n")
    sys.stderr.flush()
    os._exit(7)


def fail(*_: Any) -> None:
    raise RuntimeError("connection closed by peer")


def fail_late(*_: Any) -> None:
    time.sleep(1.0)
    raise RuntimeError("connection closed by peer")


def refuse(*_: Any) -> None:
    raise CheckpointError("/data/model: no weights")


def diverge(*_: Any) -> None:
    raise NotFiniteError("the loss of step 3 is nan")


def wait(folder: Path, place: RankPlace) -> None:
    """Until it is asked to stop, as a training that goes on."""
    deadline = time.monotonic() + WAIT_S
    while not is_stop_requested() and time.monotonic() < deadline:
        time.sleep(0.05)
    write(folder / f"stopped-{place.global_rank}.json", is_stop_requested())


def hang(folder: Path, place: RankPlace) -> None:
    """Whatever it is asked; with a process of its own beside it."""
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({WAIT_S})"])
    write(folder / f"child-{place.global_rank}.json", child.pid)
    time.sleep(WAIT_S)


def log(*_: Any) -> None:
    import logging

    logging.getLogger("trainer").info("a step")
    logging.getLogger("trainer").warning("a warning")


def add(folder: Path, place: RankPlace) -> None:
    """All ranks meet and add up their numbers."""
    import torch
    import torch.distributed as dist

    meeting = f"tcp://{place.master_address}:{place.master_port}"
    dist.init_process_group("gloo", init_method=meeting, rank=place.global_rank, world_size=place.world_size)
    total = torch.tensor(float(place.global_rank))
    dist.all_reduce(total)
    write(folder / f"sum-{place.global_rank}.json", total.item())
    dist.destroy_process_group()


ACTS = {
    "kill": kill,
    "leave": leave,
    "fail": fail,
    "fail late": fail_late,
    "refuse": refuse,
    "diverge": diverge,
    "wait": wait,
    "hang": hang,
    "log": log,
    "add": add,
}
