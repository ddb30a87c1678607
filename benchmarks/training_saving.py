"""Peak memory and time of what training saves memory by, each way in a process of its own, rounds interleaved.

python -m benchmarks.training_saving [--what loss model] [--dtypes float32 bfloat16] [--tokens 16384] [--rounds 5]

The loss's ways: ``plain`` (logits of all tokens), ``tiled-N`` (ours, N tokens a tile), ``tiles-again`` (tiles that are
checkpointed, so that logits are computed again in the backward) and DeepSpeed's. The model's ways: a step of a small
Llama on one rank with nothing saved, then with one saving after the other. A way's peak is the growth of its process's
resident memory over its first run, the sizes of what it is given left out; times are medians over rounds.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.machine import count_cores, describe_commit, describe_machine, describe_versions
from longctx.training.config import TrainLoopConfig
from longctx.training.tiled_loss import tiled_cross_entropy

HIDDEN_SIZE, NUM_LAYERS, MLP_SIZE = 256, 8, 1024
LOSS_WAYS = ("plain", "tiled-512", "tiled-1024", "tiled-4096", "tiles-again-1024", "deepspeed-1024")
MODEL_WAYS: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "tiled loss": {"activation_checkpointing": False},
    "and checkpointing": {"keep_attention": False},
    "and kept attention": {},
    "and tiled MLP": {"mlp_tile": 1024},
    "and offload": {"mlp_tile": 1024, "activation_offload": True},
}
Step = Callable[[int], None]  # one run on so many tokens


def make_loss_step(way: str, num_tokens: int, vocab_size: int, dtype: torch.dtype) -> Step:
    """Loss and gradients of hidden states and weight."""
    hidden = torch.randn(num_tokens, HIDDEN_SIZE).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab_size, HIDDEN_SIZE)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab_size, (num_tokens,))
    name, _, tile = way.rpartition("-")

    def step(num: int) -> None:
        hidden.grad = weight.grad = None
        x, y = hidden[:num], targets[:num]
        if way == "plain":
            loss = _untiled(x, y, weight)
        elif name == "tiled":
            loss = tiled_cross_entropy(x, weight, y, tile=int(tile))
        elif name == "tiles-again":
            tiles = zip(x.split(int(tile)), y.split(int(tile)), strict=True)
            loss = torch.stack([checkpoint(_untiled, *both, weight, use_reentrant=False) for both in tiles]).sum()
        else:
            loss = _run_deepspeed(x, y, weight, -(-num // int(tile)))
        loss.backward()

    return step


def make_model_step(way: str, num_tokens: int, vocab_size: int, dtype: torch.dtype) -> Step:
    """Loss and gradients of a Llama with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from longctx.training.loss_head import LossHead
    from longctx.training.memory_saving import save_memory
    from longctx.training.sequence_parallel import SequenceParallel

    choices = MODEL_WAYS[way]
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=MLP_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=num_tokens,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    input_ids = torch.randint(0, vocab_size, (1, num_tokens))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    SequenceParallel(model, layout="contiguous")  # plugs in the attention that training has
    head = None
    if choices is not None:
        head = LossHead(model, tile=TrainLoopConfig().loss_tile)
        folder = Path(tempfile.gettempdir())
        save_memory(model, TrainLoopConfig(**choices), device=torch.device("cpu"), scratch=folder)

    def step(num: int) -> None:
        model.zero_grad()
        x, y = input_ids[:, :num], input_ids[:, :num].roll(-1, 1)
        if head is None:
            loss = F.cross_entropy(model(input_ids=x, use_cache=False).logits[0].float(), y[0])
        else:
            loss = head.loss(model, y, scale=1 / num, input_ids=x, use_cache=False)
        loss.backward()

    return step


def serve_way(connection: Connection, make: Callable[..., Step], arguments: tuple[Any, ...]) -> None:
    """A way's process: its peak first, then a time for every request."""
    torch.set_num_threads(count_cores())
    torch.manual_seed(0)
    step, num_tokens = make(*arguments), arguments[1]
    step(64)  # libraries are loaded and weights' gradients are there
    Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
    before = _read_status("VmRSS")
    step(num_tokens)
    connection.send(_read_status("VmHWM") - before)
    while connection.recv():
        began = time.perf_counter()
        step(num_tokens)
        connection.send(time.perf_counter() - began)


def measure(
    make: Callable[..., Step], ways: list[str], arguments: tuple[Any, ...], num_rounds: int
) -> list[dict[str, Any]]:
    """Every way's peak and median seconds, next to the first way's."""
    context = multiprocessing.get_context("spawn")
    connections, peaks = {}, {}
    for way in ways:
        ours, theirs = context.Pipe()
        context.Process(target=serve_way, args=(theirs, make, (way, *arguments)), daemon=True).start()
        peaks[way] = ours.recv()
        connections[way] = ours
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(num_rounds):
        for way, connection in connections.items():
            connection.send(True)
            seconds[way].append(connection.recv())
    for connection in connections.values():
        connection.send(False)
    return [
        {
            "way": way,
            "peak_mib": round(peaks[way] / 2**20, 1),
            "peak_to_first": round(peaks[way] / peaks[ways[0]], 3),
            "seconds": round(statistics.median(seconds[way]), 4),
            "seconds_spread": [round(min(seconds[way]), 4), round(max(seconds[way]), 4)],
            "seconds_to_first": round(statistics.median(map(_divide, seconds[way], seconds[ways[0]])), 3),
        }
        for way in ways
    ]


def main() -> None:
    """Print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=["loss", "model"], choices=["loss", "model"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=16384, help="of the loss; the model has a quarter")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args()
    results = []
    parts = {
        "loss": (make_loss_step, list(LOSS_WAYS), settings.tokens),
        "model": (make_model_step, list(MODEL_WAYS), settings.tokens // 4),
    }
    for dtype in settings.dtypes:
        for what in settings.what:
            make, ways, num_tokens = parts[what]
            rows = measure(make, ways, (num_tokens, settings.vocab, getattr(torch, dtype)), settings.rounds)
            results += [{"what": what, "dtype": dtype, "num_tokens": num_tokens} | row for row in rows]
    described = {"machine": describe_machine(), "versions": describe_versions()} | describe_commit()
    print(
        json.dumps(described | {"settings": vars(settings), "hidden_size": HIDDEN_SIZE, "results": results}, indent=1)
    )


def _untiled(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def _run_deepspeed(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, num_tiles: int) -> torch.Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def compute(_: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return _untiled(x, y, weight)

    arguments = (compute, None, hidden[None], targets[None], None, num_tiles, [weight], "sum")
    return TiledFusedLogitsLoss.apply(*arguments)


def _divide(seconds: float, others: float) -> float:
    return seconds / others


def _read_status(name: str) -> int:
    """Bytes of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    main()
