"""How long a context LoRA training of an 8B model takes on one GPU: memory, step time, share of peak FLOP/s.

    python -m benchmarks.training_gpu --contexts 16384 262144 --save training-gpu

Each context is a training run of its own, as ``longctx train`` makes it without Ray: random bfloat16 weights, one
document, activation checkpointing, nothing offloaded. A step takes minutes: one or a few are enough.
"""

import argparse
import json
import logging
import random
import string
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.machine import describe_run, keep_result
from benchmarks.training import add_end_token
from longctx.config import compose
from longctx.errors import LongctxError
from longctx.models.checkpoint import inspect_checkpoint
from longctx.training.config import TrainConfig
from longctx.training.launch import launch_locally
from longctx.training.memory_plan import plan_memory
from longctx.training.sinks.metrics_file import read_metrics
from longctx.training.time_plan import plan_attention
from parallel.links import LinkModel

logger = logging.getLogger(__name__)


def measure(arguments: argparse.Namespace, num_tokens: int, folder: Path) -> dict[str, Any]:
    """One context: what was planned and what was seen; the reason if it failed."""
    run_folder = folder / str(num_tokens)
    run_folder.mkdir()
    checkpoint = ensure_checkpoint(arguments.model, run_folder, with_weights=False, max_context=num_tokens)
    data = run_folder / "rows.jsonl"
    letters = random.Random(num_tokens)
    with data.open("w") as file:
        for _ in range(arguments.steps + 2):
            text = "".join(letters.choices(string.ascii_lowercase, k=num_tokens - 1))  # a letter is a token
            file.write(json.dumps({"text": text}) + "\n")
    output = run_folder / "run"
    overrides = [
        "model.init=random",
        "model.dtype=bfloat16",
        f"model.device={arguments.device}",
        "data.shuffle=false",
        "peft.method=lora",
        f"train.context_length={num_tokens}",
        f"train.num_steps={arguments.steps}",
        "train.keep_attention=false",
        f"train.mlp_tile={arguments.mlp_tile}",
        "checkpoint.every=0",
        "checkpoint.export=false",
        "logger.tensorboard=false",
        "cluster.launcher=local",
        "cluster.max_restarts=0",
        *arguments.overrides,
    ]
    paths = [f"output={output}", f"model.path={add_end_token(checkpoint, run_folder / 'model')}", f"data.path={data}"]
    config = compose(TrainConfig, "train", [*paths, *overrides])
    spec = inspect_checkpoint(config.model.path, require_weights=False)
    attention = plan_attention(spec, config, LinkModel())
    plan = plan_memory(spec, config, attention, device_type=arguments.device)
    row: dict[str, Any] = {"num_tokens": num_tokens, "overrides": overrides, "planned_bytes": dict(plan.parts)}
    try:
        launch_locally(config, stop=threading.Event())
    except LongctxError as error:
        return row | {"error": str(error)[-2000:]}
    records = read_metrics(output)
    return row | {
        "peak_memory_bytes": max(max(record.memory_bytes) for record in records),
        "step_s": [record.seconds for record in records],
        "tokens_per_s": [record.tokens_per_s for record in records],
        "flops_share": [record.flops_share for record in records],
        "loss": [record.loss for record in records],
    }


def main() -> None:
    """Run the contexts and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="8b", choices=SHAPES)
    parser.add_argument("--contexts", nargs="+", type=int, default=[16384, 262144])
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--mlp-tile", type=int, default=16384)
    parser.add_argument("--overrides", nargs="*", default=[], help="further ones, as longctx train takes them")
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    content = {
        **describe_run("training_gpu"),
        "model": arguments.model,
        "contexts": [],
    }
    with tempfile.TemporaryDirectory() as name:
        for num_tokens in arguments.contexts:
            content["contexts"].append(measure(arguments, num_tokens, Path(name)))
            logger.info("%s", content["contexts"][-1])
            keep_result(content, arguments.save)  # after each: the next may not end
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
