"""The endpoint as a Ray Serve replica, where ASGI tests do not reach: clients that leave, processes that are killed."""

import concurrent.futures
import json
import os
import random
import signal
import socket
import time
from pathlib import Path

import httpx
import psutil
import pytest
from openai import AuthenticationError, OpenAI

from tests.cli_server import CliServer, metric, wait_until
from tests.local_server import check_error

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DOCUMENT = Path(random.__file__).read_text()  # a byte is a token
LONG = DOCUMENT[:14_000]  # seconds to compute; the small pool holds 16,384
WORKERS = ("prefill-0", "decode-0")


@pytest.fixture
def idle(served) -> CliServer:
    """The server, with every worker there and nothing to do."""
    wait_until(lambda: all(worker["alive"] for worker in served.status()["workers"]), 120, served.output)
    wait_until(served.is_idle, 120, served.status)
    return served


def kv_bytes_shipped(server: CliServer) -> float:
    return metric(httpx.get(server.url + "/metrics", timeout=30).text, "longctx_kv_bytes_shipped_total")


@pytest.mark.parametrize("stream", [False, True])
def test_chat_with_the_stock_client(idle, stream):
    client = OpenAI(base_url=idle.url + "/v1", api_key=idle.key, max_retries=0)
    messages = [{"role": "user", "content": "What is a list?"}]
    if not stream:
        answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=8, temperature=0)
        assert answer.choices[0].message.content
        assert answer.usage.completion_tokens <= 8
        return
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=messages,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage.prompt_tokens > len("What is a list?")


def test_tokens_come_one_by_one(idle):
    """Events are sent as they come, not at the end."""
    times = []
    fields = {"model": "demo", "prompt": "import ", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", idle.url + COMPLETIONS, json=fields, headers=idle.headers, timeout=120) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        times += [time.monotonic() for line in response.iter_lines() if line.startswith("data: {")]
    assert len(times) > 20
    assert times[len(times) // 2] - times[0] > 0.1 * (times[-1] - times[0])


def test_a_long_prompt_is_shipped_once_then_cached(idle):
    prompt = f"# {time.time()}\n" + DOCUMENT[:3000]
    shipped = kv_bytes_shipped(idle)
    first, second = (idle.post(COMPLETIONS, prompt=prompt, max_tokens=4, temperature=0).json() for _ in range(2))
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 2500
    wait_until(lambda: kv_bytes_shipped(idle) > shipped)
    assert idle.worker("prefill-0")["transport"]


def test_parallel_requests_do_not_mix(idle):
    prompts = [DOCUMENT[at : at + length] for at, length in ((0, 40), (90, 900), (500, 60), (1500, 1400), (900, 700))]

    def ask(prompt: str) -> str:
        response = idle.post(COMPLETIONS, prompt=prompt, max_tokens=24, temperature=0)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    alone = [ask(prompt) for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        together = list(pool.map(ask, prompts + prompts))
    assert together == alone + alone


@pytest.mark.parametrize(
    ("content", "status", "param", "code"),
    [
        (b'{"model": "demo", "prompt"', 400, None, None),
        (b'{"model": "demo", "prompt": "\xff"}', 400, None, None),
        (b'{"model": "other", "prompt": "x"}', 404, "model", "model_not_found"),
        (b'{"model": "demo", "prompt": ""}', 400, "prompt", None),
        (b'{"model": "demo", "prompt": "x", "temperature": -1}', 400, "temperature", None),
        (b'{"model": "demo", "prompt": [70000]}', 400, "prompt", None),
        (b" " * (2 * 2**20), 413, None, "body_too_large"),
    ],
    ids=["json", "utf-8", "model", "empty", "temperature", "token id", "too large"],
)
def test_refusals(idle, content, status, param, code):
    response = httpx.post(idle.url + COMPLETIONS, content=content, headers=idle.headers, timeout=60)
    check_error(response, status, param=param, code=code)


def test_keys_are_asked_for(idle):
    check_error(httpx.get(idle.url + "/v1/models", timeout=30), 401, code="invalid_api_key")
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=idle.url + "/v1", api_key="wrong", max_retries=0).models.list()
    assert httpx.get(idle.url + "/health", timeout=30).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "busy"), [(LONG, "prefill-0"), ("import ", "decode-0")], ids=["while prefilling", "while decoding"]
)
def test_a_client_that_leaves_costs_nothing(idle, prompt, busy, stream):
    """Its pages are free at once: left alone, either request would go on for much longer."""
    fields = {"model": "demo", "prompt": f"# {time.time()}\n{prompt}", "max_tokens": 2000, "ignore_eos": True}
    body = json.dumps(fields | {"stream": stream}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {idle.key}\r\ncontent-length: {len(body)}"
    with socket.create_connection(("127.0.0.1", idle.port), timeout=30) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: idle.worker(busy)["engine"]["num_running"], 30, idle.status)
    wait_until(idle.is_idle, 3.0, idle.status)  # about half a second on an idle machine


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param("prefill-0", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("decode-0", signal.SIGSTOP, marks=pytest.mark.slow),
        ("decode-0", signal.SIGKILL),
    ],
)
def test_a_killed_or_frozen_worker_is_replaced(idle, name, fault):
    """Nobody loses a token: another worker, or this one when it is back, goes on."""
    jobs = [(DOCUMENT[i * 50 : i * 50 + length], i % 2 == 0) for i, length in enumerate((90, 11000, 100, 12000, 13000))]

    def ask(job: tuple[str, bool]) -> httpx.Response:
        prompt = f"# {time.time()} {job[0]}"
        return idle.post(COMPLETIONS, prompt=prompt, stream=job[1], max_tokens=200, ignore_eos=True)

    victim = idle.worker(name)["pid"]
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        answers = [pool.submit(ask, job) for job in jobs]
        wait_until(lambda: idle.worker(name)["engine"]["num_running"], 30, idle.status)
        os.kill(victim, fault)
        wait_until(lambda: name in httpx.get(idle.url + "/health", timeout=30).json()["reason"], 30, idle.output)
        health = httpx.get(idle.url + "/health", timeout=30)
        responses = [answer.result() for answer in answers]
    assert (health.status_code == 200) == (name == "prefill-0")
    for response, (_, is_stream) in zip(responses, jobs, strict=True):
        assert response.status_code == 200, response.text
        if is_stream:
            assert "data: [DONE]" in response.text
            assert "server_error" not in response.text
        else:
            assert response.json()["usage"]["completion_tokens"] == 200
    wait_until(lambda: idle.worker(name)["alive"] and idle.worker(name)["pid"] != victim, 120, idle.output)
    assert idle.post(COMPLETIONS, prompt=DOCUMENT[:2000], max_tokens=4).status_code == 200


@pytest.mark.slow
def test_a_killed_endpoint_is_replaced(idle):
    """Serve starts it again; the workers, which go on, give up what was asked before."""
    processes = psutil.Process(idle.process.pid).children(recursive=True)
    (victim,) = (each for each in processes if "ServeReplica" in " ".join(each.cmdline()))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asking = pool.submit(idle.post, COMPLETIONS, prompt="import ", max_tokens=2000, ignore_eos=True)
        wait_until(lambda: idle.worker("decode-0")["engine"]["num_running"], 30, idle.status)
        victim.kill()
        with pytest.raises(httpx.TransportError):
            asking.result()
    idle.wait_until_ready()
    wait_until(idle.is_idle, 30, idle.status)
    assert idle.post(COMPLETIONS, prompt="import ", max_tokens=4).status_code == 200
