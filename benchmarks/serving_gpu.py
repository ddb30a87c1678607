"""The engine on a GPU, without Ray: time to the first token and per token of an 8B shape with random weights.

    python -m benchmarks.serving_gpu --save serving-gpu

The weights are made on the GPU. Cells are prompt tokens x streams x output tokens; shares are of this GPU's measured
limits (``benchmarks/limits.py``): FLOPs of a prompt over those of the best product, bytes that a decode step must read
over the fastest read. Rounds go through all cells, medians are over rounds.
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.limits import measure_limits
from benchmarks.machine import describe_run, keep_result
from benchmarks.report import round_floats
from benchmarks.timings import Limits, RequestTiming, check_timing, measure_wave, summarise
from benchmarks.waves import Cell, draw_prompts
from longctx.engine.build import build_engine
from longctx.engine.config import EngineConfig
from longctx.engine.engine import Engine
from longctx.messages import GenerationRequest, SamplingParams
from longctx.models.config import ModelConfig

logger = logging.getLogger(__name__)

TARGETS = {"decode_share_of_bandwidth": 0.7, "prefill_share_of_matmul": 0.5}  # one stream; 32K tokens


def run_wave(engine: Engine, prompts: list[list[int]], num_output_tokens: int) -> list[RequestTiming]:
    """Add every prompt, then step until all are done."""
    params = SamplingParams(max_tokens=num_output_tokens, ignore_eos=True, temperature=0.0)
    arrivals: dict[str, list[float]] = {str(idx): [] for idx in range(len(prompts))}
    sent_s = time.perf_counter()
    for idx, prompt in enumerate(prompts):
        engine.add(GenerationRequest(str(idx), tuple(prompt), params))
    while engine.has_work:
        deltas = engine.step()
        now_s = time.perf_counter()
        for delta in deltas:
            arrivals[delta.request_id] += [now_s] * len(delta.token_ids)
    return [RequestTiming(sent_s, tuple(times), len(prompts[0]), len(times)) for times in arrivals.values()]


def measure(engine: Engine, cells: list[Cell], limits: Limits, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All cells, a round of each in turn; the first round warms up."""
    shape = SHAPES[arguments.model]
    waves: dict[Cell, list[dict[str, float]]] = {cell: [] for cell in cells}
    for round_idx in range(arguments.rounds + 1):
        for cell in cells:
            prompts = draw_prompts(f"{round_idx} {cell}", cell, shape.vocab_size)
            timings = run_wave(engine, prompts, cell.num_output_tokens)
            for timing in timings:
                check_timing(timing, cell.num_output_tokens)
            if round_idx:
                waves[cell].append(measure_wave(timings))
                logger.info("%s: %s", cell, round_floats(waves[cell][-1]))
    found = []
    for cell, rounds in waves.items():
        sizes = {
            "num_prompt_tokens": cell.num_prompt_tokens,
            "num_output_tokens": cell.num_output_tokens,
            "num_streams": cell.num_streams,
        }
        found.append(sizes | round_floats(summarise(rounds, shape, limits, **sizes)))
    return found


def profile(engine: Engine, vocab_size: int, *, num_prompt_tokens: int) -> None:
    """Log what the kernels of a prompt's last chunks and of decode steps take."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    prompt = draw_prompts("profile", Cell(num_prompt_tokens, 8, 1), vocab_size)[0]
    engine.add(GenerationRequest("p", tuple(prompt), SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0)))
    num_chunk = engine.config.max_batch_tokens
    while engine.progress("p")[0] + num_chunk < num_prompt_tokens:
        engine.step()
    for name in ("last chunk of the prompt", "decode steps"):
        with trace(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            for _ in range(1 if "chunk" in name else 4):
                engine.step()
            torch.cuda.synchronize()
        logger.info("%s\n%s", name, found.key_averages().table(sort_by="cuda_time_total", row_limit=22))
    while engine.has_work:
        engine.step()


def main() -> None:
    """Run the cells and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="8b", choices=SHAPES)
    parser.add_argument("--cells", nargs="+", default=["1024x1x64", "32768x1x64", "1024x16x64"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--kv-bytes", default="16GiB")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--no-graphs", action="store_true", help="decode without CUDA graphs")
    parser.add_argument("--profile", type=int, metavar="TOKENS", help="also log the kernels of a prompt so long")
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    sizes = [[int(part) for part in text.split("x")] for text in arguments.cells]
    cells = [Cell(num_prompt_tokens=size[0], num_streams=size[1], num_output_tokens=size[2]) for size in sizes]
    longest = max(cell.num_prompt_tokens + cell.num_output_tokens for cell in cells)
    measured = measure_limits(SHAPES[arguments.model], arguments.device)
    logger.info("limits: %s", measured["best"])
    content = describe_run("serving_gpu") | {"model": arguments.model, "limits": measured, "targets": TARGETS}
    with tempfile.TemporaryDirectory() as name:
        folder = ensure_checkpoint(arguments.model, Path(name), with_weights=False, max_context=longest)
        model = ModelConfig(path=str(folder), device=arguments.device, attention=arguments.attention)
        config = EngineConfig(
            kv_bytes=arguments.kv_bytes,
            max_batch_tokens=arguments.max_batch_tokens,
            max_sequences=max(cell.num_streams for cell in cells),
            prefix_cache=False,
            cuda_graphs=not arguments.no_graphs,
        )
        engine = build_engine(model, config, random_weights_seed=0)
    stats = engine.stats()
    content["settings"] = {"attention": stats.attention, "dtype": stats.dtype, "page_size": stats.page_size}
    content["settings"] |= {"max_batch_tokens": config.max_batch_tokens, "cuda_graphs": config.cuda_graphs}
    if arguments.profile:
        profile(engine, SHAPES[arguments.model].vocab_size, num_prompt_tokens=arguments.profile)
    limits = Limits(measured["best"]["matmul_tflops"] * 1e12, measured["best"]["read_gb_per_s"] * 1e9)
    content["cells"] = measure(engine, cells, limits, arguments)
    if arguments.device == "cuda":
        content["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(content, indent=1))
    keep_result(content, arguments.save)


if __name__ == "__main__":
    main()
