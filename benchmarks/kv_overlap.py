"""What is left to send when a prompt is computed, and what the second token waits for, over a slowed-down network.

    python -m benchmarks.kv_overlap --mbit 1000 --save kv-overlap

Needs root. Three hosts (network namespaces) with a real Ray: the endpoint, a prefill and a decode worker; prompts
of random words, one at a time, over HTTP. The residual is the prefill worker's own figure: from the first token to the
decode worker's acknowledgement of the whole KV. It is compared with what sending all of the KV after the last layer
would take at the link's full rate, headers not counted, which is less than it could really take. The second token is
compared with the following ones of the same stream.
"""

import argparse
import itertools
import json
import logging
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.checkpoints import FIRST_WORD_ID, SHAPES, ensure_checkpoint
from benchmarks.machine import describe_run, keep_result
from tests.cli_server import metric
from tests.multihost.hosts import Hosts, start_hosts

logger = logging.getLogger(__name__)

MAX_TOKENS = 24
ASK_TIMEOUT_S = 300.0


def main() -> None:
    """Run the lengths and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="110m", choices=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mbit", type=float, default=1000, help="Mbit/s of a host's port")
    parser.add_argument("--codec", default="none")
    parser.add_argument("--work", default="/tmp/longctx-bench", help="folder for checkpoints")
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    if arguments.save and arguments.rounds < 5:
        parser.error(f"--rounds={arguments.rounds} is too few for a result that is kept; at least 5")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    checkpoint = ensure_checkpoint(arguments.model, Path(arguments.work))
    overrides = [
        f"model.path={checkpoint}",
        "model.dtype=bfloat16",
        "engine.kv_bytes=1GiB",
        "cluster.local_prefill_tokens=0",
        f"transport.codec={arguments.codec}",
        "transport.name=tcp",
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        start_hosts(Path(folder), *overrides, num_hosts=3, mbit=arguments.mbit) as hosts,
    ):
        apart = {role: hosts.host_of(f"{role}-0") for role in ("prefill", "decode")}
        if len(set(apart.values())) == 1:
            raise RuntimeError(f"both workers are on one host: {apart}")
        cells = [measure(hosts, arguments, length) for length in arguments.lengths]
    content = {
        **describe_run("kv_overlap"),
        "settings": {key: value for key, value in vars(arguments).items() if key != "save"},
        "hosts": apart,
        "cells": cells,
    }
    print(json.dumps(content, indent=1))
    keep_result(content, arguments.save)


def measure(hosts: Hosts, arguments: argparse.Namespace, length: int) -> dict[str, Any]:
    """One prompt length; the first round warms up."""
    rounds = []
    for index in range(arguments.rounds + 1):
        rng = random.Random(1000 * length + index)
        prompt = [rng.randrange(FIRST_WORD_ID, SHAPES[arguments.model].vocab_size) for _ in range(length)]
        before = shipped(hosts)
        arrivals = hosts.run(lambda prompt=prompt: ask(hosts.server.url, arguments.model, prompt))
        time.sleep(0.6)  # the workers' figures are a moment old
        after = shipped(hosts)
        num_bytes, residual_s = after[0] - before[0], after[1] - before[1]
        gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
        rounds.append(
            {
                "ttft_s": arrivals[1] - arrivals[0],
                "second_s": gaps[1],
                "later_s": statistics.median(gaps[2:]),
                "shipped_bytes": num_bytes,
                "residual_s": residual_s,
                "serialized_s": num_bytes * 8 / (arguments.mbit * 1e6),
            }
        )
        logger.info("%d tokens: %s", length, rounds[-1])
    timed = rounds[1:]
    medians = {key: statistics.median(each[key] for each in timed) for key in timed[0]}
    return {
        "num_tokens": length,
        **medians,
        "residual_share": medians["residual_s"] / medians["serialized_s"],
        "second_token_penalty": statistics.median(each["second_s"] / each["later_s"] for each in timed) - 1,
        "rounds": timed,
    }


def ask(url: str, model: str, prompt: list[int]) -> list[float]:
    """When one stream was asked for, and when each of its tokens came, ``time.perf_counter()``."""
    body = {
        "model": f"llama-{model}",
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    arrivals = [time.perf_counter()]
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=ASK_TIMEOUT_S) as response:
        if response.status_code != 200:
            raise RuntimeError(response.read().decode())
        for line in response.iter_lines():
            if line.startswith("data: {"):
                arrivals.append(time.perf_counter())
    if len(arrivals) < MAX_TOKENS // 2:
        raise RuntimeError(f"only {len(arrivals) - 1} events came")
    return arrivals


def shipped(hosts: Hosts) -> tuple[float, float]:
    """KV bytes that were shipped so far, and seconds of residuals."""
    text = hosts.run(lambda: httpx.get(hosts.server.url + "/metrics", timeout=30).text)
    return metric(text, "longctx_kv_bytes_shipped_total"), metric(text, "longctx_kv_residual_seconds_total")


if __name__ == "__main__":
    main()
