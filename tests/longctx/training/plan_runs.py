"""What ranks of a training test run: the same steps again for each of several exchange plans, from the same weights."""

from typing import Any

import torch
import torch.distributed as dist

from longctx.training.config import TrainConfig
from longctx.training.place import RankPlace
from longctx.training.run_parts import RunParts
from longctx.training.sequence_parallel import SequenceParallel
from longctx.training.trainer import TrainingRun

PLANS: tuple[str, ...] = ("kv_ring",)  # set by the test in its processes
NUM_STEPS = 20


class Replay:
    """A stream that gives the same batches again."""

    num_skipped = 0

    def __init__(self, batches: list[Any]) -> None:
        self._batches = iter(batches)

    def next_batch(self) -> list[Any]:
        return next(self._batches)

    def close(self) -> None:
        """Nothing runs."""


def train_with_each_plan(config: TrainConfig, place: RankPlace) -> dict[str, Any]:
    """Per plan: losses, gradient norms and the weights in the end."""
    parts = RunParts(config, place)
    batches = [parts.stream.next_batch() for _ in range(NUM_STEPS)]
    parts.stream.close()
    initial = gather_weights(parts)
    runs: dict[str, Any] = {}
    for plan in PLANS:
        parts.parallel = SequenceParallel(parts.parallel.model, group=parts.world.sp_group, plan=plan)
        parts.stream = Replay(batches)
        parts.engine.restore(0, lambda name, part, start, numel: read(initial, name, part, start, numel))
        run = TrainingRun(parts)
        records = [run.train_step() for _ in range(NUM_STEPS)]
        runs[plan] = {
            "losses": [record.loss for record in records],
            "norms": [record.grad_norm for record in records],
            "weights": {name: weight.numpy() for name, weight in gather_weights(parts).items()},
        }
    parts.close()
    return runs


def read(weights: dict[str, torch.Tensor], name: str, part: str, start: int, numel: int) -> torch.Tensor:
    """Of a checkpoint that has no steps behind it."""
    return weights[name][start : start + numel] if part == "master" else torch.zeros(numel)


def gather_weights(parts: RunParts) -> dict[str, torch.Tensor]:
    """Every trained weight, flattened, out of all ranks' fragments."""
    own = [(each.name, each.start, each.master.clone()) for each in parts.engine.fragments()]
    everybody: list[Any] = [None] * parts.world.world_size
    dist.all_gather_object(everybody, own)
    whole = {name: torch.full((torch.Size(shape).numel(),), float("nan")) for name, shape in parts.shapes.items()}
    for name, start, piece in (each for rank in everybody for each in rank):
        whole[name][start : start + len(piece)] = piece
    assert not any(weight.isnan().any() for weight in whole.values()), "fragments leave something out"
    return whole
