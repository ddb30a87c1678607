"""Peak memory of training ranks, as ``longctx plan train`` predicts it and as it is; prints a table, or JSON.

    python -m benchmarks.training_memory --save training-memory

Every configuration is a run of its own of two steps, on the CPU, one thread a rank, random weights. Measured is the
most that a rank's process had in memory, libraries apart, up to the end of its second step; the fullest rank counts,
as in the plan.
"""

import argparse
import json
import logging
import random
import shutil
import statistics
import string
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import ensure_checkpoint
from benchmarks.machine import REPOSITORY, describe_commit, describe_machine, describe_versions
from benchmarks.training import add_end_token
from longctx.config import compose
from longctx.models.checkpoint import inspect_checkpoint
from longctx.training.config import TrainConfig
from longctx.training.launch import launch_locally
from longctx.training.memory_plan import PARTS, plan_memory
from longctx.training.sinks.metrics_file import read_metrics
from longctx.training.time_plan import plan_attention
from parallel.links import LinkModel

logger = logging.getLogger(__name__)

MODELS = ("tiny", "22m", "110m")
TARGET = 0.1  # of the measured memory
FULL = ("train.activation_checkpointing=false",)
LORA = ("peft.method=lora",)


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration."""

    model: str
    length: int
    dtype: str = "float32"
    zero_stage: int = 1
    sp_degree: int = 1
    dp_degree: int = 1
    others: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """As ``longctx train`` takes them."""
        return [
            "model.init=random",
            f"model.dtype={self.dtype}",
            f"train.context_length={self.length}",
            f"train.batch_size={self.dp_degree}",
            "train.num_steps=2",
            "train.num_threads=1",
            f"deepspeed.zero_stage={self.zero_stage}",
            f"parallel.sp_degree={self.sp_degree}",
            f"parallel.dp_degree={self.dp_degree}",
            "checkpoint.export=false",
            "checkpoint.every=0",
            "cluster.launcher=local",
            "cluster.max_restarts=0",
            "logger.peak_flops=1e11",
            *self.others,
        ]

    def __str__(self) -> str:
        ranks = f"dp{self.dp_degree} sp{self.sp_degree}"
        others = " ".join(text.rpartition(".")[2] for text in self.others)
        return f"{self.model} {self.length} {self.dtype} zero{self.zero_stage} {ranks} {others}".rstrip()


CASES = (
    Case("tiny", 2048),
    Case("tiny", 8192),
    Case("tiny", 16384),
    Case("tiny", 4096, others=FULL),
    Case("tiny", 8192, "bfloat16"),
    Case("tiny", 4096, "bfloat16", others=FULL),
    Case("tiny", 8192, sp_degree=2),
    Case("tiny", 8192, sp_degree=2, others=("parallel.plan=ulysses",)),
    Case("tiny", 4096, dp_degree=2),
    Case("tiny", 8192, others=("train.loss_tile=0",)),
    Case("22m", 2048, zero_stage=0),
    Case("22m", 4096, zero_stage=1),
    Case("22m", 2048, zero_stage=2),
    Case("22m", 2048, zero_stage=3),
    Case("22m", 2048, "bfloat16", zero_stage=0),
    Case("22m", 4096, "bfloat16", zero_stage=1),
    Case("22m", 2048, "bfloat16", zero_stage=2),
    Case("22m", 2048, "bfloat16", zero_stage=3),
    Case("22m", 2048, zero_stage=1, dp_degree=2),
    Case("22m", 4096, zero_stage=2, sp_degree=2),
    Case("22m", 2048, zero_stage=3, sp_degree=2),
    Case("22m", 2048, "bfloat16", zero_stage=3, dp_degree=2),
    Case("22m", 4096, others=("train.mlp_tile=1024",)),
    Case("22m", 4096, others=LORA),
    Case("22m", 4096, "bfloat16", sp_degree=2, others=LORA),
    Case("22m", 2048, others=(*LORA, *FULL)),
    Case("22m", 2048, others=(*LORA, "peft.target_modules=[all-linear]", *FULL)),
    Case("22m", 2048, "bfloat16", others=("peft.method=series", *FULL)),
    Case("22m", 2048, others=("peft.method=parallel", *FULL)),
    Case("110m", 1024),
    Case("110m", 1024, "bfloat16", zero_stage=2, sp_degree=2),
    Case("110m", 2048, "bfloat16", others=LORA),
)


def measure(case: Case, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Predicted and measured bytes of one configuration."""
    data = folder / "rows.jsonl"
    letters = random.Random(0)
    with data.open("w") as file:
        for _ in range(4 * case.dp_degree):  # a letter is a token, as is the end
            file.write(json.dumps({"text": "".join(letters.choices(string.ascii_lowercase, k=case.length - 1))}) + "\n")
    output = folder / "run"
    overrides = [f"output={output}", f"model.path={checkpoint}", f"data.path={data}", *case.overrides]
    config = compose(TrainConfig, "train", overrides)
    spec = inspect_checkpoint(checkpoint, require_weights=False)
    plan = plan_memory(spec, config, plan_attention(spec, config, LinkModel()), device_type="cpu")
    launch_locally(config, stop=threading.Event())
    record = read_metrics(output)[-1]
    shutil.rmtree(output)
    measured = max(record.memory_bytes)
    return {
        "case": str(case),
        "overrides": case.overrides,
        "moment": plan.moment,
        "parts": dict(plan.parts),
        "predicted_bytes": plan.total,
        "measured_bytes": measured,
        "error": plan.total / measured - 1,
        "error_without_runtime": (plan.total - measured) / max(1, measured - plan.parts["runtime"]),
        "step_s": record.seconds,
    }


def describe(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown, and how many reach the target."""
    lines = ["| configuration | predicted MiB | measured MiB | error | moment |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['case']} | {row['predicted_bytes'] / 2**20:.0f} | {row['measured_bytes'] / 2**20:.0f} "
        f"| {row['error']:+.1%} | {row['moment']} |"
        for row in rows
    ]
    within = sum(abs(row["error"]) <= TARGET for row in rows)
    median = statistics.median(abs(row["error"]) for row in rows)
    return "\n".join([*lines, "", f"{within} of {len(rows)} within {TARGET:.0%}; median error {median:.1%}"])


def main() -> None:
    """Run the configurations and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--only", help="configurations whose name holds this text")
    parser.add_argument("--work", default="/tmp/longctx-bench", help="folder for checkpoints")
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints: dict[str, Path] = {}
        for case in CASES:
            if case.model not in arguments.models or (arguments.only and arguments.only not in str(case)):
                continue
            if case.model not in checkpoints:
                whole = ensure_checkpoint(case.model, Path(arguments.work))
                checkpoints[case.model] = add_end_token(whole, folder / case.model)
            rows.append(measure(case, checkpoints[case.model], folder))
            shown = {part: round(rows[-1]["parts"][part] / 2**20) for part in PARTS}
            logger.info("%s: %s %s", case, describe(rows[-1:]).splitlines()[2], shown)
    print(describe(rows))
    if arguments.save:
        content = {
            "benchmark": "training_memory",
            **describe_commit(),
            "hardware": describe_machine(),
            "versions": describe_versions(),
            "target_error": TARGET,
            "configurations": rows,
        }
        path = REPOSITORY / "benchmarks" / "results" / f"{arguments.save}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
