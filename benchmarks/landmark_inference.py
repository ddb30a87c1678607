"""Landmark attention over long contexts under a fixed near budget: what a decoded token costs, and what stays resident.

    python -m benchmarks.landmark_inference [--shape 110m] [--lengths 8192 131072] [--near 384MiB] [--save NAME]
    python -m benchmarks.landmark_inference --model demo_landmark --near 16MiB

Random weights retrieve blocks all over the context, which is worse for the cache than a trained model; ``--model``
takes a trained one whose tokens are bytes, over Python sources. Each length is a process of its own, the lengths in
turns, so that the peak of resident memory is of one length; a round reports the median decode step, the time to the
first token and the blocks fetched.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.machine import describe_run, keep_result

NUM_TOKENS = 64  # decoded; blocks of 64: one of the steps computes a landmark
LANDMARK_ID = 300
LIMIT_S = 3600.0


def main() -> None:
    """Run every length, print and save."""
    arguments = _parse()
    if arguments.length is not None:
        print(json.dumps(_measure(arguments)))
        return
    result = describe_run("landmark_inference") | {"settings": vars(arguments)}
    rounds: dict[int, list[dict[str, Any]]] = {length: [] for length in arguments.lengths}
    for _ in range(arguments.rounds):
        for length in arguments.lengths:
            rounds[length].append(_run(length))
            print(length, rounds[length][-1], file=sys.stderr, flush=True)
    shortest = arguments.lengths[0]
    result["lengths"] = {
        length: {
            "rounds": of_length,
            "tpot_ratio": statistics.median(
                own["tpot_s"] / first["tpot_s"] for own, first in zip(of_length, rounds[shortest], strict=True)
            ),
            "peak_ratio": statistics.median(
                own["peak_bytes"] / first["peak_bytes"] for own, first in zip(of_length, rounds[shortest], strict=True)
            ),
        }
        for length, of_length in rounds.items()
    }
    print(json.dumps(result, indent=1))
    keep_result(result, arguments.save)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="110m", choices=list(SHAPES))
    parser.add_argument("--model", help="in place of random weights")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--near", default="384MiB", help="engine.kv_bytes")
    parser.add_argument("--blocks", default="file", choices=["near", "host", "file"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", help="name in benchmarks/results")
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(length: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.landmark_inference", *sys.argv[1:], "--length", str(length)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One prompt of one length, in this process."""
    import torch

    from longctx.attention.config import AttentionConfig
    from longctx.engine.build import build_engine
    from longctx.engine.config import EngineConfig
    from longctx.messages import GenerationRequest, SamplingParams
    from longctx.models import demo_data
    from longctx.models.config import ModelConfig
    from longctx.training.peak import read_peak_memory
    from memory.tiered_pages import TieredPages

    with tempfile.TemporaryDirectory() as work:
        engine = build_engine(
            ModelConfig(path=arguments.model or _make_model(arguments.shape, Path(work)), max_context=1 << 18),
            EngineConfig(kv_bytes=arguments.near, max_batch_tokens=512, max_sequences=4, prefix_cache=False),
            attention=AttentionConfig(blocks=arguments.blocks),
            random_weights_seed=None if arguments.model else 0,
        )
    if arguments.model:
        prompt = torch.tensor(demo_data.encode(demo_data.load_corpora()[0].text[: 2 * arguments.length]))
        prompt = prompt[: arguments.length]
    else:
        generator, num_words = torch.Generator().manual_seed(arguments.length), SHAPES[arguments.shape].vocab_size
        prompt = torch.randint(LANDMARK_ID + 1, num_words, (arguments.length,), generator=generator)
    params = SamplingParams(max_tokens=NUM_TOKENS + 1, ignore_eos=True, temperature=0.0)
    engine.add(GenerationRequest("r", tuple(prompt.tolist()), params))
    begun, ends = time.perf_counter(), []
    while engine.has_work:
        if engine.step():
            ends.append(time.perf_counter())
    steps = [later - sooner for sooner, later in pairwise(ends)]
    pages = engine.pool
    return {
        "length": arguments.length,
        "ttft_s": ends[0] - begun,
        "tpot_s": statistics.median(steps),
        "slowest_step_s": max(steps),
        "peak_bytes": read_peak_memory(engine.decoder.device),
        "num_fetched": pages.num_fetched if isinstance(pages, TieredPages) else 0,
        "num_hits": pages.num_hits if isinstance(pages, TieredPages) else 0,
    }


def _make_model(shape: str, work: Path) -> str:
    """A landmark checkpoint without weights."""
    folder = ensure_checkpoint(shape, work, with_weights=False)
    config = json.loads((folder / "config.json").read_text())
    config["longctx_attention"] = {"name": "landmark", "block_size": 64, "landmark_token_id": LANDMARK_ID}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


if __name__ == "__main__":
    main()
