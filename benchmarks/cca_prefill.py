"""CCA attention against dense attention in one engine: time to first token, time per token, pages; prints JSON.

    python -m benchmarks.cca_prefill --model 110m --lengths 16384 65536 --save cca-prefill

Both engines are in this process, over one checkpoint of random weights, and take turns; every prompt is new. ``limit``
is what the products of matrices alone would gain: FLOPs of dense attention's prefill over those of CCA's.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.checkpoints import FIRST_WORD_ID, SHAPES, Shape, ensure_checkpoint
from benchmarks.machine import count_cores, describe_run, keep_result
from longctx.attention.config import AttentionConfig
from longctx.engine.build import build_engine
from longctx.engine.config import EngineConfig
from longctx.engine.engine import Engine
from longctx.messages import GenerationRequest, SamplingParams
from longctx.models.config import ModelConfig

TARGET = 5.0  # times faster prefill at 64K tokens


def main() -> None:
    """Run the rounds and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="110m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536])
    parser.add_argument("--outputs", type=int, default=17, help="new tokens of each prompt")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--make-weights", action="store_true", help="on the device, instead of in a file")
    parser.add_argument("--kv-bytes", default="4GiB", help="of each engine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("/tmp/longctx-bench"))
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    options = parser.parse_args()
    if options.save and options.rounds < 5:
        parser.error(f"--rounds={options.rounds} is not allowed with --save: at least 5")
    result = describe_run("cca_prefill") | {"settings": {name: str(value) for name, value in vars(options).items()}}
    result |= {"target": TARGET, "num_threads": count_cores(), "lengths": measure(options)}
    print(json.dumps(result, indent=1))
    keep_result(result, options.save)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """By length: medians of both methods, and of the rounds' ratios."""
    shape = SHAPES[options.model]
    longest = max(options.lengths) + options.outputs
    has_file = not options.make_weights
    folder = ensure_checkpoint(options.model, options.work, with_weights=has_file, max_context=longest)
    engines = {name: make_engine(folder, config, options) for name, config in choose_configs(options).items()}
    rng, found = random.Random(0), {}
    for length in options.lengths:
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        for round_idx in range(options.rounds):
            if round_idx == 0:  # a short prompt warms up
                for engine in engines.values():
                    generate(engine, draw_prompt(rng, shape, min(length, 2048)), 2)
            prompt = draw_prompt(rng, shape, length)
            for name in rng.sample(list(engines), len(engines)):
                samples[name].append(generate(engines[name], prompt, options.outputs))
        found[str(length)] = summarise(samples) | {"limit": round(count_gain(shape, length, options), 2)}
    return found


def choose_configs(options: argparse.Namespace) -> dict[str, AttentionConfig]:
    """The two methods."""
    cca = AttentionConfig(name="cca", group_size=options.group_size, window=options.window)
    return {"dense": AttentionConfig(name="dense"), "cca": cca}


def make_engine(folder: Path, method: AttentionConfig, options: argparse.Namespace) -> Engine:
    """An engine of its own, without a prefix cache: every prompt is computed."""
    model = ModelConfig(path=str(folder), device=options.device, dtype=options.dtype)
    config = EngineConfig(kv_bytes=options.kv_bytes, prefix_cache=False, max_sequences=1)
    return build_engine(model, config, attention=method, random_weights_seed=0 if options.make_weights else None)


def draw_prompt(rng: random.Random, shape: Shape, length: int) -> tuple[int, ...]:
    """Token ids."""
    return tuple(rng.randrange(FIRST_WORD_ID, shape.vocab_size) for _ in range(length))


def generate(engine: Engine, prompt: tuple[int, ...], num_outputs: int) -> dict[str, float]:
    """Seconds to the first token and per token from then on; the most entries of KV held."""
    params = SamplingParams(temperature=0, max_tokens=num_outputs, ignore_eos=True)
    engine.add(GenerationRequest("r", prompt, params))
    begun, times, most = time.perf_counter(), [], 0
    while engine.has_work:
        num_tokens = len(engine.step())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times += [time.perf_counter()] * num_tokens
        most = max(most, engine.stats().num_pages_used)
    per_token = (times[-1] - times[0]) / max(1, len(times) - 1)
    return {"ttft_s": times[0] - begun, "tpot_s": per_token, "entries": most * engine.pool.layout.page_size}


def summarise(samples: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, and how many times better CCA is, round by round."""
    medians = {
        name: {key: round(statistics.median(sample[key] for sample in own), 4) for key in own[0]}
        for name, own in samples.items()
    }
    ratios = {
        f"{key.removesuffix('_s')}_gain": [
            a[key] / b[key] for a, b in zip(samples["dense"], samples["cca"], strict=True)
        ]
        for key in ("ttft_s", "tpot_s", "entries")
    }
    gains = {key: round(statistics.median(values), 3) for key, values in ratios.items()}
    ranges = {f"{key}_range": [round(f(values), 3) for f in (min, max)] for key, values in ratios.items()}
    return medians | gains | ranges | {"num_rounds": len(samples["cca"])}


def count_gain(shape: Shape, length: int, options: argparse.Namespace) -> float:
    """FLOPs of a dense prefill over those of CCA's."""
    positions = np.arange(length)
    cores = np.maximum(0, (positions + 1 - options.window) // options.group_size)
    seen = int((cores + positions + 1 - cores * options.group_size).sum())  # pairs of a query and a key that it sees
    dense, all_pairs = shape.prefill_flops(length), length * (length + 1) // 2
    return dense / (dense - 4 * (all_pairs - seen) * shape.num_layers * shape.num_heads * shape.head_dim)


if __name__ == "__main__":
    main()
