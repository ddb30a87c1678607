"""The arithmetic of the serving benchmark, and its HTTP client against a server that is not ours."""

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.checkpoints import FIRST_WORD_ID, SHAPES, Shape, ensure_checkpoint
from benchmarks.load import send_wave
from benchmarks.report import compare, round_floats
from benchmarks.timings import Limits, RequestTiming, check_timing, measure_wave, summarise
from benchmarks.waves import Cell, Record, draw_prompts
from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.tokenizer import load_tokenizer

TINY = Shape(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=96, vocab_size=400)


@pytest.mark.parametrize("shape", [TINY, replace(TINY, tied=False), SHAPES["110m"], SHAPES["450m"]])
def test_parameters_are_those_of_the_model(shape: Shape) -> None:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.num_parameters == model.num_parameters()


def test_prefill_flops_are_those_counted_by_torch() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    num_tokens = 48
    config = AutoConfig.for_model(
        "llama",
        hidden_size=TINY.hidden_size,
        intermediate_size=TINY.mlp_size,
        num_hidden_layers=TINY.num_layers,
        num_attention_heads=TINY.num_heads,
        num_key_value_heads=TINY.num_kv_heads,
        head_dim=TINY.head_dim,
        vocab_size=TINY.vocab_size,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(1, num_tokens, dtype=torch.long), logits_to_keep=1)
    # Eager attention computes all pairs of a query and a key; ours counts those that a causal mask leaves.
    hidden_pairs = num_tokens * (num_tokens - 1) / 2
    attention = 2 * 2 * hidden_pairs * TINY.num_layers * TINY.num_heads * TINY.head_dim
    assert counter.get_total_flops() == TINY.prefill_flops(num_tokens) + attention


def test_checkpoint_loads_and_decodes_every_id(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    folder = ensure_checkpoint("tiny", tmp_path)
    spec = inspect_checkpoint(folder)
    tokenizer = load_tokenizer(spec)
    assert (spec.num_parameters, spec.dtype) == (TINY.num_parameters, "bfloat16")
    assert not tokenizer.eos_token_ids
    assert tokenizer.vocab_size == TINY.vocab_size
    assert all(tokenizer.decode([token_id]) == f" w{token_id}" for token_id in range(FIRST_WORD_ID, TINY.vocab_size))
    assert tokenizer.decode(tokenizer.encode("naïve 日本")) == "naïve 日本"
    written_ns = (folder / "model.safetensors").stat().st_mtime_ns
    assert ensure_checkpoint("tiny", tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written_ns


def test_prompts_are_fresh_by_seed_and_in_range() -> None:
    cell = Cell(num_prompt_tokens=500, num_streams=3, num_output_tokens=8)
    prompts = draw_prompts("1", cell, 400)
    assert prompts == draw_prompts("1", cell, 400)
    assert [len(prompt) for prompt in prompts] == [500] * 3
    assert len({tuple(prompt[:16]) for prompt in prompts + draw_prompts("2", cell, 400)}) == 6
    assert all(FIRST_WORD_ID <= token_id < 400 for prompt in prompts for token_id in prompt)


def test_wave_numbers() -> None:
    timings = [
        RequestTiming(10.0, (11.0, 11.5, 12.0), num_prompt_tokens=100, num_output_tokens=3),
        RequestTiming(10.0, (13.0, 13.1, 13.2), num_prompt_tokens=100, num_output_tokens=3),
    ]
    wave = measure_wave(timings)
    assert wave == pytest.approx(
        {
            "ttft_s": 2.0,
            "prefill_tokens_per_s": 200 / 3,
            "tpot_ms": 300.0,
            "itl_ms": 300.0,
            "events_per_token": 1.0,
            "requests_per_s": 2 / 3.2,
            "output_tokens_per_s": 6 / 3.2,
        }
    )


def test_tokens_that_share_an_event_count_one_by_one() -> None:
    timing = RequestTiming(0.0, (1.0, 3.0), num_prompt_tokens=10, num_output_tokens=5)
    assert timing.tpot_s == pytest.approx(0.5)
    assert measure_wave([timing])["events_per_token"] == pytest.approx(0.4)


@pytest.mark.parametrize(("event_s", "num_tokens"), [((1.0, 2.0), 4), ((1.0,), 3)])
def test_wrong_output_is_refused(event_s: tuple[float, ...], num_tokens: int) -> None:
    timing = RequestTiming(0.0, event_s, num_prompt_tokens=10, num_output_tokens=num_tokens)
    with pytest.raises(RuntimeError, match=r"3 output tokens|event"):
        check_timing(timing, 3)


def test_summary_takes_medians_and_shares() -> None:
    waves = [
        measure_wave([RequestTiming(0.0, (ttft_s, ttft_s + 0.5), num_prompt_tokens=64, num_output_tokens=2)])
        for ttft_s in (1.0, 4.0, 2.0)
    ]
    cell = {"num_prompt_tokens": 64, "num_output_tokens": 2, "num_streams": 1}
    limits = Limits(matmul_flops_per_s=TINY.prefill_flops(64), read_bytes_per_s=TINY.decode_bytes(65))
    result = summarise(waves, TINY, limits, **cell)
    assert result["ttft_s"] == 2.0
    assert result["spread"]["ttft_s"] == [1.0, 4.0]
    assert result["prefill_share_of_matmul"] == pytest.approx(0.5)  # the limit would take one second, this took two
    assert result["decode_share_of_bandwidth"] == pytest.approx(2.0)  # half a second per step


def test_ratio_is_taken_round_by_round() -> None:
    names = ("prefill_tokens_per_s", "ttft_s", "tpot_ms", "itl_ms", "requests_per_s", "output_tokens_per_s")
    ours = Record(rounds=[dict.fromkeys(names, value) for value in (1.0, 20.0, 3.0)])
    theirs = Record(rounds=[dict.fromkeys(names, value) for value in (2.0, 40.0, 2.0)])
    assert compare(ours, theirs) == dict.fromkeys(names, 0.5)


def test_round_floats() -> None:
    assert round_floats({"a": [1.23456, 7], "b": "x"}) == {"a": [1.235, 7], "b": "x"}


@pytest.mark.parametrize("num_streams", [1, 3])
def test_client_times_every_event(num_streams: int) -> None:
    prompts = [[300, 301, 302]] * num_streams
    timings = _send(prompts, events=[" a", "", " b", " c"], num_tokens=4)
    assert [timing.num_prompt_tokens for timing in timings] == [3] * num_streams
    assert [len(timing.event_s) for timing in timings] == [3] * num_streams  # the one without text is no arrival
    assert all(timing.sent_s < timing.event_s[0] < timing.event_s[-1] <= time.perf_counter() for timing in timings)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"events": [" a", " b"], "num_tokens": 3}, "asked for 4 output tokens, got 3"),
        ({"events": [" a", " b"], "num_tokens": 4, "status": "503 Busy"}, "answered 503"),
        ({"events": [" a", " b"], "num_tokens": None}, "without usage"),
        ({"events": [" a", " b"], "num_tokens": 4, "num_prompt_tokens": 7}, "counts 7 prompt tokens"),
    ],
)
def test_client_refuses_a_bad_answer(answer, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        _send([[300, 301, 302]], **answer)


def _send(
    prompts: list[list[int]],
    *,
    events: list[str],
    num_tokens: int | None,
    status: str = "200 OK",
    num_prompt_tokens: int = 3,
) -> list[RequestTiming]:
    """Send prompts, 4 output tokens each, to a server that answers every request with ``events``."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
        body = json.loads(await reader.readexactly(length))
        assert body["prompt"] == prompts[0]
        assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (4, 4, True)
        writer.write(f"HTTP/1.1 {status}\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n".encode())
        chunks: list[dict[str, Any]] = [{"choices": [{"text": text}]} for text in events]
        if num_tokens is not None:
            usage = {"completion_tokens": num_tokens, "prompt_tokens": num_prompt_tokens}
            chunks.append({"choices": [], "usage": usage})
        for data in [*map(json.dumps, chunks), "[DONE]"]:
            writer.write(f"data: {data}\n\n".encode())
            await writer.drain()
        writer.close()

    async def run() -> list[RequestTiming]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            return await send_wave(url, "bench", prompts, num_output_tokens=4, timeout_s=10)

    return asyncio.run(run())
