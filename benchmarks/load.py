"""Loads OpenAI-compatible servers: completions of token ids over HTTP, streamed as server-sent events."""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

from benchmarks.timings import RequestTiming, check_timing

DONE = b"[DONE]"


async def send_wave(
    url: str, model: str, prompts: Sequence[Sequence[int]], *, num_output_tokens: int, timeout_s: float
) -> list[RequestTiming]:
    """Send all prompts at one time, greedy, and time what streams back.

    Args:
        url: of the server, without ``/v1``.
        model: the name it serves.
        prompts: token ids.
        num_output_tokens: exactly this many are asked for and must come, at least 2.
        timeout_s: for the whole wave.

    Raises:
        RuntimeError: the server refuses, fails, or sends another number of tokens.
        TimeoutError: it takes longer than ``timeout_s``.
    """
    bodies = [make_body(model, prompt, num_output_tokens) for prompt in prompts]
    limits = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=0)) as session:
        sending = [
            complete(session, url, body, num_prompt_tokens=len(prompt))
            for prompt, body in zip(prompts, bodies, strict=True)
        ]
        try:
            timings = await asyncio.gather(*sending)
        except aiohttp.ClientError as error:
            raise RuntimeError(f"{url}: {type(error).__name__}: {error}") from error
    for timing in timings:
        check_timing(timing, num_output_tokens)
    return timings


def make_body(model: str, prompt: Sequence[int], num_output_tokens: int) -> str:
    return json.dumps(
        {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": num_output_tokens,
            "min_tokens": num_output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


async def complete(session: aiohttp.ClientSession, url: str, body: str, *, num_prompt_tokens: int) -> RequestTiming:
    sent_s = time.perf_counter()
    headers = {"content-type": "application/json"}
    async with session.post(f"{url}/v1/completions", data=body, headers=headers) as response:
        if response.status != 200:
            raise RuntimeError(f"{url} answered {response.status}: {(await response.text())[:500]}")
        event_s, usage = await _read_events(response.content)
    if usage["prompt_tokens"] != num_prompt_tokens:
        raise RuntimeError(f"{url} counts {usage['prompt_tokens']} prompt tokens, {num_prompt_tokens} were sent")
    return RequestTiming(sent_s, tuple(event_s), num_prompt_tokens, usage["completion_tokens"])


async def _read_events(stream: aiohttp.StreamReader) -> tuple[list[float], dict[str, Any]]:
    """Arrival times of events with text, and the usage."""
    event_s: list[float] = []
    usage: dict[str, Any] | None = None
    async for line in stream:
        if not line.startswith(b"data:"):
            continue
        arrived_s = time.perf_counter()
        data = line[5:].strip()
        if data == DONE:
            break
        event = json.loads(data)
        if "error" in event:
            raise RuntimeError(f"the server failed: {event['error']}")
        if any(choice.get("text") for choice in event.get("choices", ())):
            event_s.append(arrived_s)
        usage = event.get("usage") or usage
    if usage is None:
        raise RuntimeError("the stream ended without usage")
    return event_s, usage
