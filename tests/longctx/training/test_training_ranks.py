"""dp x sp ranks train as one rank does: losses, gradients and weights, for every ZeRO stage and exchange plan."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from longctx.training.config import (
    DeepSpeedConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainLoopConfig,
    TrainModelConfig,
)
from longctx.training.data.config import DataConfig
from longctx.training.place import RankOrder, find_port, make_places
from longctx.training.rank import run_rank
from parallel.plans import PLANS
from tests.longctx.training import plan_runs
from tests.parallel.gloo_ranks import run_ranks
from tests.tiny_checkpoints import make_checkpoint

TOLERANCE = 1e-5


def make_config(folder: Path, **parts: Any) -> TrainConfig:
    """Tiny Llama, packed documents, float32."""
    model, data = folder / "model", folder / "rows.jsonl"
    if not model.exists():
        make_checkpoint(model, "llama")
        words = random.Random(0)
        rows = [
            " ".join(words.choices(["sun", "moon", "a", "of the", "sea"], k=words.randint(2, 30))) for _ in range(90)
        ]
        data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    config = TrainConfig(
        output=str(folder / "run"),
        model=TrainModelConfig(path=str(model), dtype="float32", device="cpu"),
        data=DataConfig(path=str(data)),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1),
        train=TrainLoopConfig(context_length=96, batch_size=2, num_steps=plan_runs.NUM_STEPS, num_threads=1),
    )
    return dataclasses.replace(config, **parts)


def train(rank: int, world_size: int, _: str, config: TrainConfig, port: int, plans: tuple[str, ...]) -> dict[str, Any]:
    dist.destroy_process_group()
    plan_runs.PLANS = plans
    place = make_places(["here"] * world_size, address="127.0.0.1", port=port, restart=0)[rank]
    outcome = run_rank(RankOrder(config, place, body="tests.longctx.training.plan_runs:train_with_each_plan"))
    assert outcome.report is not None, outcome.failure or outcome.error
    return outcome.report


def run(config: TrainConfig, plans: tuple[str, ...]) -> dict[str, Any]:
    world_size = config.parallel.dp_degree * config.parallel.sp_degree
    return run_ranks(train, world_size, config, find_port("127.0.0.1"), plans)[0]


def check_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(wanted["losses"], rel=TOLERANCE)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=TOLERANCE)
    for name, weight in wanted["weights"].items():
        assert np.linalg.norm(found["weights"][name] - weight) <= TOLERANCE * np.linalg.norm(weight), name


def check_ranks(folder: Path, zero_stage: int, plans: tuple[str, ...]) -> None:
    deepspeed = DeepSpeedConfig(zero_stage=zero_stage, persistence_threshold=0)
    (alone,) = run(make_config(folder, deepspeed=DeepSpeedConfig(zero_stage=0)), ("kv_ring",)).values()
    config = make_config(folder, deepspeed=deepspeed, parallel=ParallelConfig(dp_degree=2, sp_degree=2))
    for plan, found in run(config, plans).items():
        assert len(found["losses"]) == 20, plan
        check_equal(found, alone)


@pytest.mark.slow
def test_ranks_train_as_one_does(tmp_path):
    check_ranks(tmp_path, 3, ("token_ring",))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "plans"), [(1, ("auto", *PLANS)), (2, ("token_ring",)), (3, ("auto", "ulysses"))]
)
def test_every_stage_and_plan(tmp_path, zero_stage, plans):
    check_ranks(tmp_path, zero_stage, plans)
