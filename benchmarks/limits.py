"""The machine's limits, measured with all its cores: bf16 matmul and memory reads.

python -m benchmarks.limits [--shape 450m] [--device cuda]
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.checkpoints import SHAPES, Shape
from benchmarks.machine import count_cores
from longctx.models.linear import make_linear

SQUARE = 4096
NUM_TOKENS = 8192  # rows of a prefill's matmuls
READ_BYTES = 2**30
MIN_REPEATS = 5
MIN_SECONDS = 0.5  # of repeating: other programs' bursts are to miss some of the repeats
MAX_SECONDS = 8.0  # of repeating what is slow


def measure_limits(shape: Shape, device: str = "auto") -> dict[str, Any]:
    """The best of several repeats of everything.

    Args:
        shape: whose linear layers are measured, too.
        device: ``cpu``, ``cuda``, or ``auto``: the GPU if there is one.

    Returns:
        ``matmul_tflops``: of 4096^3 and of each linear, by torch in bfloat16 and float32 and by our linear layers;
        ``read_gb_per_s``: by each way of reading; ``best``: the highest of each, which shares refer to.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(count_cores())
    with torch.inference_mode():
        matmul = {"4096x4096x4096": _time_matmul(SQUARE, SQUARE, SQUARE, device)}
        for rows, columns in sorted({*shape.linears.values()}):
            matmul[f"{NUM_TOKENS}x{columns}x{rows}"] = _time_matmul(NUM_TOKENS, rows, columns, device)
        read = _time_reads(device)
    best = {
        "matmul_tflops": max(max(kinds.values()) for kinds in matmul.values()),
        "read_gb_per_s": max(read.values()),
    }
    return {
        "device": device,
        "num_threads": torch.get_num_threads(),
        "matmul_tflops": matmul,
        "read_gb_per_s": read,
        "best": best,
    }


def _time_matmul(num_tokens: int, num_rows: int, num_columns: int, device: str) -> dict[str, float]:
    """TFLOP/s of ``[num_tokens, num_columns] x [num_columns, num_rows]`` by each kind of linear layer."""
    x = torch.randn(num_tokens, num_columns, device=device).bfloat16()
    weight = torch.randn(num_rows, num_columns, device=device).bfloat16()
    wide_x, wide_weight = x.float(), weight.float()
    layers: dict[str, Callable[[], object]] = {"bfloat16": lambda: F.linear(x, weight)}
    if device == "cpu":
        ours = make_linear(weight)
        layers |= {"float32": lambda: F.linear(wide_x, wide_weight), "longctx": lambda: ours(x)}
    flops = 2 * num_tokens * num_rows * num_columns
    return {name: round(flops / _best_seconds(multiply, device) / 1e12, 3) for name, multiply in layers.items()}


def _time_reads(device: str) -> dict[str, float]:
    """GB/s of reading a buffer much larger than the caches."""
    values = torch.ones(READ_BYTES // 4, device=device)
    side = int((READ_BYTES // 2) ** 0.5) // 64 * 64
    weight = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    layer = make_linear(weight)
    x = torch.ones(1, side, dtype=torch.bfloat16, device=device)
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "float32_sum": (values.nbytes, values.sum),
        "float32_dot": (values.nbytes, lambda: torch.dot(values, values)),  # one tensor: read once
        "bfloat16_matvec": (weight.nbytes, lambda: layer(x)),
    }
    return {name: round(size / _best_seconds(read, device) / 1e9, 2) for name, (size, read) in ways.items()}


def _best_seconds(run: Callable[[], object], device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    run()
    best = float("inf")
    num_repeats, begin = 0, time.perf_counter()
    while (spent_s := time.perf_counter() - begin) < MAX_SECONDS and (
        num_repeats < MIN_REPEATS or spent_s < MIN_SECONDS
    ):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - start)
        num_repeats += 1
    return best


def main() -> None:
    """Print the limits as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--shape", choices=SHAPES, default="110m", help="whose linear layers to measure")
    arguments = parser.parse_args()
    print(json.dumps(measure_limits(SHAPES[arguments.shape], arguments.device), indent=2))


if __name__ == "__main__":
    main()
