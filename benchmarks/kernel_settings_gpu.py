"""Settings of Triton kernels on a GPU: what each would take with other tiles, warps and stages; prints JSON.

    python -m benchmarks.kernel_settings_gpu --save kernel-settings-gpu

One row times each matrix of an 8B shape, beside torch's product: microseconds and GB/s, out of a captured graph, over
weights that do not fit the cache. Landmark at 16,384 tokens and CCA at 131,072, 32:8 heads of 128, bfloat16:
milliseconds of each kernel, by the profiler. The first setting is the one in use. Compiling takes most of the time.
"""

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.checkpoints import SHAPES
from benchmarks.machine import describe_run, keep_result
from longctx.attention import triton_cca, triton_landmark
from longctx.attention.landmark_blocks import find_blocks
from longctx.models import triton_linear

logger = logging.getLogger(__name__)

Setting = dict[str, dict[str, int]]

COLD_BYTES = 500_000_000  # of weights that are read in turn
MIN_KERNEL_MS = 0.05  # shorter kernels are not told
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
BLOCK_SIZE, GROUP_SIZE, WINDOW = 64, 16, 1024
ONE_ROW = (  # outputs and columns of a program's tile, warps
    (4, 1024, 4), (2, 1024, 4), (1, 2048, 4), (1, 4096, 4), (2, 2048, 4), (2, 4096, 8), (4, 2048, 8), (8, 512, 4),
    (8, 1024, 8), (4, 512, 2), (16, 512, 8),
)  # fmt: skip
LANDMARK: tuple[Setting, ...] = (
    {},
    {"forward": {"num_stages": 3}, "backward_queries": {"ROWS": 128, "num_warps": 8},
     "backward_keys": {"num_warps": 8, "num_stages": 1}},
    {"forward": {"ROWS": 64, "num_warps": 4}, "backward_queries": {"num_warps": 8},
     "backward_keys": {"ROWS": 128, "num_warps": 8, "num_stages": 1}},
    {"forward": {"ROWS": 64, "num_warps": 4, "num_stages": 3}, "backward_queries": {"num_stages": 1},
     "backward_keys": {"num_warps": 8}},
)  # fmt: skip
CCA: tuple[Setting, ...] = (
    {},
    {"forward": {"num_stages": 3}},
    {"forward": {"ROWS": 64, "num_warps": 4}},
    {"forward": {"ROWS": 64, "num_warps": 4, "num_stages": 3}},
    {"forward": {"COLUMNS": 128}},
)


def time_one_row() -> dict[str, Any]:
    """By matrix and setting: microseconds, and GB/s of weights."""
    shape, found = SHAPES["8b"], {}
    sizes = {*shape.linears.values(), (shape.vocab_size, shape.hidden_size)}
    for rows, columns in sorted(sizes):
        num_bytes = 2 * rows * columns
        weights = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(copies(num_bytes))]
        x = torch.randn(1, columns, device="cuda", dtype=torch.bfloat16)
        times = {"torch": time_graph(lambda weight, x=x: F.linear(x, weight), weights)}
        for setting in ONE_ROW:
            triton_linear.OUTPUTS, triton_linear.COLUMNS, triton_linear.NUM_WARPS = setting
            times[str(setting)] = time_graph(
                lambda weight, x=x: triton_linear.multiply_one_row(x, weight, None), weights
            )
        found[f"{columns}x{rows}"] = {
            name: {"us": round(us, 2), "gb_per_s": round(num_bytes / us / 1e3)} for name, us in times.items()
        }
        logger.info("%d x %d: %s", columns, rows, found[f"{columns}x{rows}"])
    triton_linear.OUTPUTS, triton_linear.COLUMNS, triton_linear.NUM_WARPS = ONE_ROW[0]
    return found


def copies(num_bytes: int) -> int:
    """How many tensors so large do not fit the cache together."""
    return max(1, -(-COLD_BYTES // num_bytes))


def time_graph(call: Callable[[torch.Tensor], torch.Tensor], weights: list[torch.Tensor]) -> float:
    """Microseconds of one call; the best of several replays."""
    call(weights[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights * 3:
            call(weight)
    best = float("inf")
    for _ in range(5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(stop))
    return best * 1e3 / (3 * len(weights))


@contextmanager
def changed(module: Any, setting: Setting) -> Iterator[None]:
    """Launches of a method's kernels have ``setting`` meanwhile."""
    plain = module._Launch.__init__

    def init(launch: Any, *args: Any) -> None:
        plain(launch, *args)
        for name, values in setting.items():
            setattr(launch, name, getattr(launch, name) | values)

    module._Launch.__init__ = init
    try:
        yield
    finally:
        module._Launch.__init__ = plain


def time_kernels(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds by kernel."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(2):
            call()
        torch.cuda.synchronize()
    times = {event.key[:40]: event.device_time_total / 2e3 for event in trace.key_averages()}
    return {name: round(ms, 3) for name, ms in times.items() if ms >= MIN_KERNEL_MS}


def time_method(module: Any, settings: tuple[Setting, ...], call: Callable[[], object]) -> dict[str, Any]:
    """By setting; the reason where one does not run."""
    found: dict[str, Any] = {}
    for setting in settings:
        try:
            with changed(module, setting):
                found[json.dumps(setting)] = time_kernels(call)
        except RuntimeError as error:  # more shared memory than there is
            found[json.dumps(setting)] = str(error).splitlines()[0]
        logger.info("%s: %s", setting, found[json.dumps(setting)])
    return found


def draw(num_tokens: int, *, has_backward: bool) -> list[torch.Tensor]:
    """Queries, keys and values."""
    return [
        torch.randn(1, num_tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16, requires_grad=has_backward)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def time_landmark(num_tokens: int) -> dict[str, Any]:
    """Forward and backward."""
    inputs = draw(num_tokens, has_backward=True)
    blocks = find_blocks(torch.arange(num_tokens) % BLOCK_SIZE == BLOCK_SIZE - 1, (0, num_tokens))

    def call() -> None:
        out = triton_landmark.attend_with_triton(*inputs, blocks, HEAD_DIM**-0.5)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return time_method(triton_landmark, LANDMARK, call)


def time_cca(num_tokens: int) -> dict[str, Any]:
    """Forward, with cores that are there."""
    q, k, v = draw(num_tokens, has_backward=False)
    cores = [x[:, ::GROUP_SIZE].contiguous() for x in (k, v)]
    sizes = GROUP_SIZE, WINDOW, HEAD_DIM**-0.5
    return time_method(triton_cca, CCA, lambda: triton_cca.AttendWithTriton.apply(q, k, v, *cores, *sizes))


def main() -> None:
    """Run what is asked for and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landmark-tokens", type=int, default=16384)
    parser.add_argument("--cca-tokens", type=int, default=131072)
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    content = describe_run("kernel_settings_gpu") | {"one_row": time_one_row()}
    content["landmark"] = time_landmark(arguments.landmark_tokens)
    content["cca"] = time_cca(arguments.cca_tokens)
    print(json.dumps(content, indent=1))
    keep_result(content, arguments.save)


if __name__ == "__main__":
    main()
