"""One rank of one engine that trains: reads a line for each step from standard input, writes a line of JSON back.

Engines: longctx's trainer; transformers with accelerate and DeepSpeed's Ulysses, as they ship; transformers with
torch's DistributedDataParallel, where ranks share no sequence and each takes one of its own. All train the same
checkpoint on random tokens, one document a sequence, with AdamW, activation checkpointing and the same element type.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from longctx.training.peak import read_peak_memory

LR = 1e-4
ADAMW = {"betas": (0.9, 0.95), "weight_decay": 0.0}  # longctx's defaults
Step = Callable[[], float]


def read_tokens(specification: dict[str, Any]) -> list[torch.Tensor]:
    """``[1, num_tokens]`` of each row of the data."""
    tokenizer = Tokenizer.from_file(str(Path(specification["model"]) / "tokenizer.json"))
    rows = [json.loads(line)["text"] for line in Path(specification["data"]).read_text().splitlines()]
    return [torch.tensor([[*tokenizer.encode(row).ids, specification["end_id"]]]) for row in rows]


def start_longctx(specification: dict[str, Any], rank: int) -> Step:
    """The trainer's own step, on sequences that are ready in memory."""
    from longctx.training.config import (
        CheckpointConfig,
        DeepSpeedConfig,
        OptimizerConfig,
        ParallelConfig,
        TrainConfig,
        TrainLoopConfig,
        TrainModelConfig,
    )
    from longctx.training.data.config import DataConfig
    from longctx.training.place import RankPlace
    from longctx.training.run_parts import RunParts
    from longctx.training.trainer import TrainingRun

    world_size = specification["world_size"]
    os.environ["LOCAL_RANK"] = "0"
    config = TrainConfig(
        output=specification["output"],
        model=TrainModelConfig(path=specification["model"], dtype=specification["dtype"], device="cpu"),
        data=DataConfig(path=specification["data"], shuffle=False),
        parallel=ParallelConfig(sp_degree=world_size, plan=specification.get("plan", "auto")),
        deepspeed=DeepSpeedConfig(zero_stage=specification["zero_stage"]),
        optimizer=OptimizerConfig(lr=LR, schedule="constant"),
        train=TrainLoopConfig(context_length=specification["num_tokens"], num_steps=1 << 20, **specification["train"]),
        checkpoint=CheckpointConfig(every=0, resume="never"),
    )
    place = RankPlace(
        global_rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        master_address="127.0.0.1",
        master_port=specification["port"],
        node="here",
        restart=0,
    )
    run = TrainingRun(RunParts(config, place))
    return lambda: run.train_step().loss


def start_ulysses(specification: dict[str, Any], rank: int) -> Step:
    """transformers and DeepSpeed's Ulysses, put together by accelerate."""
    _join_world(specification, rank)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import DeepSpeedPlugin, DeepSpeedSequenceParallelConfig
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    world_size, num_tokens = specification["world_size"], specification["num_tokens"]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": specification["zero_stage"]},
        "bf16": {"enabled": specification["dtype"] == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "sequence_parallel_size": world_size,
    }
    if specification["dtype"] == "bfloat16":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    accelerator = Accelerator(
        mixed_precision="bf16" if specification["dtype"] == "bfloat16" else "no",
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
        parallelism_config=ParallelismConfig(
            sp_size=world_size,
            sp_backend="deepspeed",
            sp_handler=DeepSpeedSequenceParallelConfig(
                sp_seq_length=num_tokens, sp_seq_length_is_variable=False, sp_attn_implementation="sdpa"
            ),
        ),
    )
    model = _load(specification)
    loader = torch.utils.data.DataLoader([0], batch_size=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **ADAMW)
    model, optimizer, _ = accelerator.prepare(model, optimizer, loader)
    part = slice(rank * num_tokens // world_size, (rank + 1) * num_tokens // world_size)
    positions = torch.arange(num_tokens)[None]
    rows = itertools.cycle(read_tokens(specification))

    def run() -> float:
        tokens = next(rows)
        targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        loss = model(
            input_ids=tokens[:, part],
            position_ids=positions[:, part],
            labels=tokens[:, part],
            shift_labels=targets[:, part],
            use_cache=False,
        ).loss
        count = (targets[:, part] != -100).sum()
        counts = [torch.zeros_like(count) for _ in range(world_size)]
        dist.all_gather(counts, count)
        losses = torch.distributed.nn.functional.all_gather(loss)
        mean = sum(each * n for each, n in zip(losses, counts, strict=True)) / sum(counts)
        accelerator.backward(mean)
        optimizer.step()
        optimizer.zero_grad()
        return float(mean)

    return run


def start_ddp(specification: dict[str, Any], rank: int) -> Step:
    """Every rank a sequence of its own."""
    _join_world(specification, rank)
    model = torch.nn.parallel.DistributedDataParallel(_load(specification))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **ADAMW)
    rows = itertools.cycle(read_tokens(specification)[rank :: specification["world_size"]])

    def run() -> float:
        tokens = next(rows)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return run


ENGINES = {"longctx": start_longctx, "deepspeed-ulysses": start_ulysses, "ddp": start_ddp}


def _load(specification: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        specification["model"], dtype=getattr(torch, specification["dtype"]), attn_implementation="sdpa"
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _join_world(specification: dict[str, Any], rank: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(specification["world_size"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(specification["port"]),
        "DS_ACCELERATOR": "cpu",
    }
    dist.init_process_group("gloo")


def main() -> None:
    """``ENGINE RANK SPECIFICATION``."""
    engine, rank, path = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    specification = json.loads(path.read_text())
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    step = ENGINES[engine](specification, rank)
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for _ in sys.stdin:
        begun = time.perf_counter()
        try:
            loss = step()
        except Exception as error:
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}) + "\n")
            answers.flush()
            raise
        seconds = time.perf_counter() - begun
        record = {"seconds": seconds, "loss": loss, "memory_bytes": read_peak_memory(torch.device("cpu"))}
        answers.write(json.dumps(record) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
