"""Landmark and CCA attention on a GPU against dense attention: the fastest of torch's kernels there.

    python -m benchmarks.attention_methods_gpu --save attention-methods-gpu

Random bfloat16 inputs, causal, one document. Landmark is timed forward and backward, with its blocks found and its keys
put into them; CCA forward, with its cores pooled. Methods take turns, medians over rounds.
"""

import argparse
import json
import logging
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import longctx
from benchmarks.machine import describe_run, keep_result

logger = logging.getLogger(__name__)

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
TARGETS = {"cca": 8.0, "landmark": 1 / 1.3}  # dense time over the method's


def measure(name: str, num_tokens: int, sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    """One method at one length."""
    has_backward = name == "landmark"
    q, k, v = (
        torch.randn(1, num_tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16, requires_grad=has_backward)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    dout = torch.randn_like(q)
    if name == "landmark":
        is_landmark = (torch.arange(num_tokens) % sizes["block_size"] == sizes["block_size"] - 1)[None]
        calls = {"ours": lambda: longctx.landmark_attention(q, k, v, is_landmark=is_landmark)}
    else:
        calls = {"ours": lambda: longctx.cca_attention(q, k, v, **sizes)}
    for backend, choice in DENSE.items():
        calls[backend] = lambda choice=choice: attend_densely(q, k, v, choice)
    times: dict[str, list[float]] = {each: [] for each in calls}
    reasons: dict[str, str] = {}
    for round_idx in range(rounds + 1):
        for each, call in calls.items():
            if each in reasons:
                continue
            try:
                seconds = time_call(call, dout if has_backward else None)
            except RuntimeError as error:
                reasons[each] = str(error).splitlines()[0]
                continue
            if round_idx:
                times[each].append(seconds)
            q.grad = k.grad = v.grad = None
    medians = {each: statistics.median(own) for each, own in times.items() if own}
    dense = min(medians[each] for each in DENSE if each in medians)
    row = {"method": name, "num_tokens": num_tokens, **sizes, "has_backward": has_backward, "median_s": medians}
    row |= {"speedup": dense / medians["ours"], "target": TARGETS[name], "not_run": reasons, "times_s": times}
    logger.info("%s %d: %.2fx of dense, %s", name, num_tokens, row["speedup"], medians)
    return row


def attend_densely(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
    """torch's attention by one kernel, ``[B, S, H, D]``."""
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
    return out.transpose(1, 2)


def time_call(call: Callable[[], torch.Tensor], dout: torch.Tensor | None) -> float:
    """Seconds of the device, with the time that it waits for the process."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    out = call()
    if dout is not None:
        out.backward(dout)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def main() -> None:
    """Run the cells and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landmark-tokens", nargs="*", type=int, default=[4096, 8192, 16384, 32768])
    parser.add_argument("--cca-tokens", nargs="*", type=int, default=[32768, 131072])
    parser.add_argument("--block-size", type=int, default=64, help="of landmark, its landmark token included")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    cells = [("landmark", num, {"block_size": arguments.block_size}) for num in arguments.landmark_tokens]
    sizes = {"group_size": arguments.group_size, "window": arguments.window}
    cells += [("cca", num, sizes) for num in arguments.cca_tokens]
    content = {
        **describe_run("attention_methods_gpu"),
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
        "cells": [measure(name, num, own, arguments.rounds) for name, num, own in cells],
    }
    print(json.dumps(content, indent=1))
    keep_result(content, arguments.save)


if __name__ == "__main__":
    main()
