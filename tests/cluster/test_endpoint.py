"""Clients who leave, dawdle or flood cost the others nothing; keys, limits and failures are answered as they should."""

import asyncio
import concurrent.futures
import json
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from openai import APIError, OpenAI

from cluster.config import ServerConfig
from cluster.endpoint import make_app
from cluster.local_backend import LocalBackend
from cluster.serving import ServedModel
from longctx.engine.config import EngineConfig
from longctx.errors import ConfigError
from tests.local_server import MODEL_NAME, LocalServer, check_error, serve
from tests.tiny_checkpoints import make_checkpoint

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = {"model": MODEL_NAME, "prompt": "The sky is"}
TALK = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "hello"}]}
ENDLESS = PROMPT | {"max_tokens": 900, "ignore_eos": True}
KEY = "correct-horse"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", seed=3)


@pytest.fixture(scope="module")
def server(folder) -> Iterator[LocalServer]:
    with serve(folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as made:
        yield made


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def worker(client: httpx.Client) -> dict:
    (only,) = client.get("/status").raise_for_status().json()["workers"]
    return only["engine"]


def is_idle(client: httpx.Client) -> bool:
    engine = worker(client)
    in_progress = client.get("/status").json()["requests_in_progress"]
    return (engine["num_waiting"], engine["num_running"], engine["num_pages_used"], in_progress) == (0, 0, 0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_pages(client, server, stream):
    wait_until(lambda: is_idle(client))
    body = json.dumps(ENDLESS | {"stream": stream, "n": 2}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: worker(client)["num_pages_used"] > 0)
    before = worker(client)["num_generated_tokens"]
    wait_until(lambda: is_idle(client))
    assert worker(client)["num_generated_tokens"] - before < 300  # of 1800


def test_slow_reader_holds_nobody_up(client, server):
    """A reader that reads nothing for a while gets everything in the end, and others are served meanwhile."""
    fields = PROMPT | {"n": 8, "seed": 1, "max_tokens": 200, "ignore_eos": True, "logprobs": 20}
    body = json.dumps(fields | {"stream": True}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", server.port))
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: worker(client)["num_running"] == 8)
        client.post(COMPLETIONS, json=PROMPT | {"max_tokens": 4}).raise_for_status()
        wait_until(lambda: worker(client)["num_running"] == 0)  # generated, though nobody reads
        assert client.get("/status").json()["requests_in_progress"] == 1
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    texts = [""] * 8
    for line in received.decode().splitlines():
        if line.startswith("data: {"):
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            texts[choice["index"]] += choice["text"]
    whole = client.post(COMPLETIONS, json=fields).json()
    assert b"data: [DONE]" in received
    assert texts == [choice["text"] for choice in whole["choices"]]


def test_200_requests_at_once(folder):
    """A small queue refuses some with 429; the others get what they would get alone."""
    engine = EngineConfig(kv_bytes="4MiB", page_size=16, num_threads=1, max_waiting=8, max_sequences=4)
    limits = httpx.Limits(max_connections=200)
    with (
        serve(folder, engine=engine) as running,
        concurrent.futures.ThreadPoolExecutor(200) as threads,
        httpx.Client(base_url=running.url, timeout=60, limits=limits) as client,
    ):

        def ask(seed: int) -> httpx.Response:
            fields = {"seed": seed % 5, "stream": seed % 2 == 0, "max_tokens": 12}
            return client.post(COMPLETIONS, json=PROMPT | fields)

        answers = list(threads.map(ask, range(200)))
        alone = [client.post(COMPLETIONS, json=PROMPT | {"seed": seed, "max_tokens": 12}).json() for seed in range(5)]
        wait_until(lambda: is_idle(client))
    refused = [answer for answer in answers if answer.status_code == 429]
    late = [answer for answer in answers if answer.status_code == 200 and is_refused_late(answer)]
    served = [(seed, answer) for seed, answer in enumerate(answers) if answer.status_code == 200 and answer not in late]
    assert refused
    assert len(served) >= 8
    assert len(refused) + len(late) + len(served) == 200
    for answer in refused:
        check_error(answer, 429, code="queue_full")
        assert int(answer.headers["retry-after"]) >= 1
    for seed, answer in served:
        assert read_text(answer) == alone[seed % 5]["choices"][0]["text"]


def is_refused_late(answer: httpx.Response) -> bool:
    """A stream whose refusal took a busy machine more than a second: the error is its only event."""
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return len(events) == 1 and json.loads(events[0])["error"]["code"] == "queue_full"


def read_text(answer: httpx.Response) -> str:
    """The text of a whole or streamed answer with one choice."""
    if answer.headers["content-type"] == "application/json":
        return answer.json()["choices"][0]["text"]
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_max_requests(folder):
    with (
        serve(folder, server=ServerConfig(max_requests=2)) as running,
        httpx.Client(base_url=running.url, timeout=30) as client,
    ):
        message = check_error(client.post(COMPLETIONS, json=PROMPT | {"prompt": ["a"] * 3}), 400, param="prompt")
        assert "server.max_requests" in message
        with client.stream("POST", COMPLETIONS, json=ENDLESS | {"prompt": ["a", "b"], "stream": True}) as held:
            assert held.status_code == 200
            check_error(client.post(COMPLETIONS, json=PROMPT), 429, code="queue_full")
        wait_until(lambda: is_idle(client))
        client.post(COMPLETIONS, json=PROMPT | {"prompt": ["a", "b"], "max_tokens": 2}).raise_for_status()


def test_targets_lower_the_limit_and_are_counted(folder):
    """Nothing keeps a microsecond; a request of several prompts is served alone all the same."""
    limits = ServerConfig(slo_ttft_s=1e-6, slo_tpot_s=1000.0)
    with serve(folder, server=limits) as running, httpx.Client(base_url=running.url, timeout=30) as client:

        def is_lowest() -> bool:
            client.post(COMPLETIONS, json=PROMPT | {"max_tokens": 2}).raise_for_status()
            return client.get("/status").json()["max_requests"] == 1

        wait_until(is_lowest)
        client.post(COMPLETIONS, json=PROMPT | {"prompt": ["a"] * 3, "max_tokens": 2}).raise_for_status()
        with client.stream("POST", COMPLETIONS, json=ENDLESS | {"stream": True}) as held:
            assert held.status_code == 200
            message = check_error(client.post(COMPLETIONS, json=PROMPT), 429, code="queue_full")
        assert "server.slo_ttft_s" in message
        metrics = client.get("/metrics").text
    assert "longctx_requests_limit 1.0" in metrics
    assert 'longctx_slo_requests_total{met="false",target="ttft"}' in metrics
    assert 'longctx_slo_requests_total{met="true",target="tpot"}' in metrics


def test_request_timeout(folder):
    """A whole answer that takes too long is a 503; in a stream the error is the last event."""
    limits = ServerConfig(request_timeout_s=1.5)
    fields = ENDLESS | {"n": 32}
    with serve(folder, server=limits) as running, httpx.Client(base_url=running.url, timeout=30) as client:
        check_error(client.post(COMPLETIONS, json=fields), 503, code="timeout")
        streamed = client.post(COMPLETIONS, json=fields | {"stream": True})
        assert streamed.status_code == 200
        events = [line for line in streamed.text.splitlines() if line.startswith("data: ")]
        assert len(events) > 1
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("server_error", "timeout")
        official = OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        with official, pytest.raises(APIError, match=r"server\.request_timeout_s"):
            list(
                official.completions.create(
                    model=MODEL_NAME, prompt="x", max_tokens=900, n=32, stream=True, extra_body={"ignore_eos": True}
                )
            )
        wait_until(lambda: is_idle(client))


def test_api_keys(folder, tmp_path):
    key_file = tmp_path / "keys"
    key_file.write_text(f"# for tests\n\n{KEY}\n")
    keys = ServerConfig(api_keys=["first"], api_key_file=str(key_file))
    with serve(folder, server=keys) as running, httpx.Client(base_url=running.url, timeout=30) as client:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": KEY},
            {"authorization": f"Basic {KEY}"},
        ):
            for path in ("/v1/models", "/status", "/nowhere"):
                check_error(client.get(path, headers=headers), 401, code="invalid_api_key")
            check_error(client.post(COMPLETIONS, json=PROMPT, headers=headers), 401, code="invalid_api_key")
        for key in ("first", KEY):
            headers = {"authorization": f"Bearer {key}"}
            assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 200


@pytest.mark.parametrize("content", [None, "\n# nothing\n"], ids=["missing", "empty"])
def test_key_file_without_keys_is_refused(folder, tmp_path, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with (
        pytest.raises(ConfigError, match=r"server\.api_key_file"),
        serve(folder, server=ServerConfig(api_key_file=str(path))),
    ):
        pass


def test_failed_step_is_answered_503(folder, monkeypatch):
    with serve(folder) as running, httpx.Client(base_url=running.url, timeout=30) as client:
        with monkeypatch.context() as patch:
            patch.setattr(running.engine, "step", lambda: 1 / 0)
            check_error(client.post(COMPLETIONS, json=PROMPT), 503, code="generation_failed")
            check_error(client.post(CHAT, json=TALK | {"stream": True}), 503, code="generation_failed")
            patch.setattr(running.engine, "stats", lambda: 1 / 0)
            assert client.get("/metrics").status_code == 200
            assert client.get("/status").json()["workers"] == []
        client.post(COMPLETIONS, json=PROMPT).raise_for_status()


def test_not_ready(server):
    """Before the backend is started health says so, and requests are answered 503."""
    model = ServedModel(MODEL_NAME, created=0, max_context=1024, vocab_size=260)
    app = make_app(LocalBackend(server.engine, model, tokenizer=server.engine.tokenizer), ServerConfig())

    async def ask() -> None:
        transport = httpx.ASGITransport(app)  # does not run the lifespan
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            health = await client.get("/health")
            assert health.status_code == 503
            assert health.json()["reason"]
            response = await client.post(COMPLETIONS, json=PROMPT)
            check_error(response, 503, code="not_ready")
            assert int(response.headers["retry-after"]) >= 1
            check_error(await client.post(CHAT, json=TALK | {"stream": True}), 503, code="not_ready")

    asyncio.run(ask())


def test_large_prompts_do_not_hold_the_loop(folder):
    """Megabytes are tokenised on a thread, and without the interpreter's lock: others are answered meanwhile.

    One text of that size would be refused before.
    """
    with (
        serve(folder) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
        concurrent.futures.ThreadPoolExecutor(1) as threads,
    ):
        big = threads.submit(client.post, COMPLETIONS, json=PROMPT | {"prompt": ["word " * 1600] * 150})
        wait_until(lambda: client.get("/status").json()["requests_in_progress"] == 1)
        num_answered = 0
        while not big.done():
            assert client.get("/health").status_code == 200
            num_answered += 1
        check_error(big.result(), 400, param="prompt", code="context_length_exceeded")
        assert num_answered > 10  # three, if the loop stands still
