"""Engines without a server, each in a process of its own that reads waves of prompts from its standard input.

    python -m benchmarks.offline longctx-engine --model DIR [--device cuda]

One line of JSON asks for a wave: ``{"prompts": [[ids], ...], "num_output_tokens": 32}``; one line answers with
``{"timings": [[sent_s, [event_s, ...], num_output_tokens], ...], "device_bytes": peak}`` or ``{"error": reason}``,
after which the process ends. The first line out is ``{"ready": ..., "settings": {...}}``. It also ends when its input
closes.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from benchmarks.machine import count_cores

Prompts = Sequence[Sequence[int]]
WaveTimes = tuple[float, list[list[float]], list[int]]  # sent at, arrivals and number of tokens of each request


class OfflineEngine(Protocol):
    """What this process wraps."""

    settings: dict[str, Any]

    def run(self, prompts: Prompts, num_output_tokens: int) -> WaveTimes:
        """Continue all prompts greedily by exactly ``num_output_tokens``."""
        ...


class LongctxEngine:
    """longctx's engine, without Ray and HTTP, fed and stepped by hand."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from longctx.engine.config import EngineConfig
        from longctx.llm import LLM
        from longctx.models.config import ModelConfig

        config = EngineConfig(kv_bytes=str(arguments.kv_bytes), max_batch_tokens=arguments.max_batch_tokens)
        self._llm = LLM(arguments.model, model_config=ModelConfig(device=arguments.device), engine_config=config)
        stats = self._llm.engine.stats()
        self.settings = {"attention": stats.attention, "dtype": stats.dtype, "device": stats.device}
        self.settings |= {"page_size": stats.page_size, "max_batch_tokens": config.max_batch_tokens}
        self._num_waves = 0

    def run(self, prompts: Prompts, num_output_tokens: int) -> WaveTimes:
        """Add every prompt, then step until all are done."""
        from longctx.messages import GenerationRequest, SamplingParams

        engine, wave = self._llm.engine, self._num_waves
        self._num_waves += 1
        params = SamplingParams(
            max_tokens=num_output_tokens, min_tokens=num_output_tokens, ignore_eos=True, temperature=0.0
        )
        requests = [GenerationRequest(f"{wave}-{i}", tuple(prompt), params) for i, prompt in enumerate(prompts)]
        arrivals: dict[str, list[float]] = {request.request_id: [] for request in requests}
        counts = dict.fromkeys(arrivals, 0)
        sent_s = time.perf_counter()
        for request in requests:
            engine.add(request)
        while engine.has_work:
            deltas = engine.step()
            now_s = time.perf_counter()
            for delta in deltas:
                if delta.error:
                    raise RuntimeError(delta.error)
                arrivals[delta.request_id].extend([now_s] if delta.token_ids else [])
                counts[delta.request_id] += len(delta.token_ids)
        return sent_s, list(arrivals.values()), list(counts.values())


class TransformersEngine:
    """``model.generate`` of transformers with sdpa attention; several prompts are one batch."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.bfloat16, attn_implementation="sdpa", local_files_only=True
        )
        self._device = "cuda" if arguments.device == "auto" and torch.cuda.is_available() else arguments.device
        self._device = "cpu" if self._device == "auto" else self._device
        self._model = model.to(self._device).eval()  # type: ignore[arg-type]
        self.settings = {"attention": "sdpa", "dtype": "bfloat16", "device": self._device}
        self.settings |= {"num_threads": torch.get_num_threads(), "batching": "one generate call per wave"}

    def run(self, prompts: Prompts, num_output_tokens: int) -> WaveTimes:
        """One batch: all prompts of a wave are equally long."""
        clock = _TokenClock()
        sent_s = time.perf_counter()
        ids = torch.tensor(prompts, device=self._device)
        with torch.inference_mode():
            self._model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_output_tokens,
                min_new_tokens=num_output_tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,  # type: ignore[arg-type]
            )
        return sent_s, [clock.event_s] * len(prompts), [len(clock.event_s)] * len(prompts)


class _TokenClock:
    """A streamer of transformers that notes when tokens come; the first call brings the prompt."""

    def __init__(self) -> None:
        self.event_s: list[float] = []
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each step's tokens, which are on the CPU by then."""
        if self._has_prompt:
            self.event_s.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        """Called after the last token."""


ENGINES: dict[str, Callable[[argparse.Namespace], OfflineEngine]] = {
    "longctx-engine": LongctxEngine,
    "transformers": TransformersEngine,
}


def main() -> None:
    """Serve waves until the input closes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--kv-bytes", type=int, default=2**31, help="KV budget of longctx-engine")
    parser.add_argument("--max-batch-tokens", type=int, default=2048, help="tokens per step of longctx-engine")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to the log
    torch.set_num_threads(count_cores())
    engine = ENGINES[arguments.engine](arguments)
    answers.write(json.dumps({"ready": arguments.engine, "settings": engine.settings}) + "\n")
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = _run(engine, order["prompts"], order["num_output_tokens"])
        except Exception as error:  # whatever it is, the other side must hear of it
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
            raise
        answers.write(json.dumps(answer) + "\n")


def _run(engine: OfflineEngine, prompts: Prompts, num_output_tokens: int) -> dict[str, Any]:
    sent_s, arrivals, counts = engine.run(prompts, num_output_tokens)
    timings = [[sent_s, event_s, count] for event_s, count in zip(arrivals, counts, strict=True)]
    device_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"timings": timings, "device_bytes": device_bytes}


if __name__ == "__main__":
    main()
