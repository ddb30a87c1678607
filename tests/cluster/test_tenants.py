"""Keys as tenants over HTTP: their limits, what the official client makes of them, and who finds whose prefixes."""

import hashlib
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from openai import OpenAI, RateLimitError

from cluster.config import ServerConfig
from longctx.engine.config import EngineConfig
from tests.cli_server import wait_until
from tests.local_server import MODEL_NAME, LocalServer, check_error, serve
from tests.tiny_checkpoints import make_checkpoint

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = {"model": MODEL_NAME, "prompt": "The sky is", "max_tokens": 4, "ignore_eos": True}  # 10 tokens
ENDLESS = PROMPT | {"max_tokens": 900, "stream": True}
ALICE, BOB = ({"authorization": f"Bearer {name}-key"} for name in ("alice", "bob"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", seed=3)


@pytest.fixture
def key_file(tmp_path) -> str:
    lines = [f"{name}:sha256:{hashlib.sha256(f'{name}-key'.encode()).hexdigest()}\n" for name in ("alice", "bob")]
    (tmp_path / "keys").write_text("".join(lines))
    return str(tmp_path / "keys")


@contextmanager
def start(folder, *, engine: EngineConfig | None = None, **options) -> Iterator[tuple[LocalServer, httpx.Client]]:
    with (
        serve(folder, server=ServerConfig(**options), engine=engine) as running,
        httpx.Client(base_url=running.url, timeout=30) as client,
    ):
        yield running, client


def slow_down(running: LocalServer, patch: pytest.MonkeyPatch) -> None:
    """A step takes so long that ``ENDLESS`` outlasts every test."""
    step = running.engine.step

    def step_slowly() -> list:
        time.sleep(0.02)
        return step()

    patch.setattr(running.engine, "step", step_slowly)


def limits(response: httpx.Response) -> dict[str, str]:
    """Its ``x-ratelimit-*`` headers, without the common part."""
    prefix = "x-ratelimit-"
    return {name.removeprefix(prefix): value for name, value in response.headers.items() if name.startswith(prefix)}


def test_places_of_a_key(folder, key_file):
    with start(folder, api_key_file=key_file, key_max_requests=1) as (_, client):
        with client.stream("POST", COMPLETIONS, json=ENDLESS, headers=ALICE) as held:
            assert held.status_code == 200
            refused = client.post(COMPLETIONS, json=PROMPT, headers=ALICE)
            message = check_error(refused, 429, code="rate_limit_exceeded")
            assert "server.key_max_requests" in message
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert client.post(COMPLETIONS, json=PROMPT, headers=BOB).status_code == 200
        wait_until(lambda: client.post(COMPLETIONS, json=PROMPT, headers=ALICE).status_code == 200)
        many = client.post(COMPLETIONS, json=PROMPT | {"prompt": ["a", "b"]}, headers=ALICE)
        assert "server.key_max_requests" in check_error(many, 400, param="prompt")
        metrics = client.get("/metrics").text
        assert 'outcome="rate_limited"' in metrics
        assert limits(refused) == {}


def test_requests_a_minute(folder, key_file):
    with start(folder, api_key_file=key_file, key_requests_per_minute=3) as (_, client):
        for remaining in (2, 1):
            left = limits(client.post(COMPLETIONS, json=PROMPT, headers=ALICE))
            assert (left["limit-requests"], left["remaining-requests"]) == ("3", str(remaining))
            assert left["reset-requests"].endswith("s")
            assert "limit-tokens" not in left
        streamed = client.post(COMPLETIONS, json=PROMPT | {"stream": True}, headers=ALICE)
        assert limits(streamed)["remaining-requests"] == "0"
        refused = client.post(CHAT, content=b"not read", headers=ALICE)
        assert "server.key_requests_per_minute" in check_error(refused, 429, code="rate_limit_exceeded")
        assert 15 <= int(refused.headers["retry-after"]) <= 20
        assert limits(refused)["remaining-requests"] == "0"
        assert limits(client.get("/v1/models", headers=ALICE))["remaining-requests"] == "0"
        assert limits(client.post(COMPLETIONS, json=PROMPT, headers=BOB))["remaining-requests"] == "2"
        assert limits(client.get("/health")) == {}


def test_tokens_a_minute(folder, key_file):
    with start(folder, api_key_file=key_file, key_tokens_per_minute=600) as (_, client):

        def remaining(response: httpx.Response) -> int:
            assert response.status_code == 200, response.text
            return int(limits(response)["remaining-tokens"])

        left = remaining(client.post(COMPLETIONS, json=PROMPT | {"max_tokens": 500}, headers=ALICE))
        assert left in range(600 - 510, 600)
        before = remaining(client.get("/v1/models", headers=BOB))
        streamed = client.post(COMPLETIONS, json=PROMPT | {"max_tokens": 300, "stream": True}, headers=BOB)
        assert remaining(streamed) < before - 250  # 310 less; it fills meanwhile
        over = client.post(COMPLETIONS, json=PROMPT | {"max_tokens": 500}, headers=BOB)
        assert "server.key_tokens_per_minute" in check_error(over, 429, code="rate_limit_exceeded")
        assert 1 <= int(over.headers["retry-after"]) <= 60
        never = client.post(COMPLETIONS, json=PROMPT | {"max_tokens": 700}, headers=BOB)
        assert "600 a minute" in check_error(never, 400, param="prompt", code="token_limit_exceeded")
        talk = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "x" * 700}], "max_tokens": 1}
        check_error(client.post(CHAT, json=talk, headers=BOB), 400, param="messages", code="token_limit_exceeded")


def test_tokens_that_were_not_generated_are_given_back(folder, monkeypatch):
    with start(folder, key_tokens_per_minute=900) as (running, client):
        slow_down(running, monkeypatch)
        with client.stream("POST", COMPLETIONS, json=ENDLESS | {"max_tokens": 800}) as held:
            lines = held.iter_lines()  # the stream ends with it
            assert next(lines)
            assert int(limits(client.get("/v1/models"))["remaining-tokens"]) < 200
        # It does not fill so far in this time.
        wait_until(lambda: int(limits(client.get("/v1/models"))["remaining-tokens"]) > 300, 5)


def test_without_keys_all_clients_share_the_limits(folder):
    with start(folder, key_requests_per_minute=1) as (_, client):
        assert client.post(COMPLETIONS, json=PROMPT).status_code == 200
        message = check_error(client.post(COMPLETIONS, json=PROMPT, headers=ALICE), 429, code="rate_limit_exceeded")
        assert "all clients together" in message


def test_the_official_client_reads_the_limits_and_waits(folder):
    """Its own retry comes after Retry-After, not after its half second."""
    ask = {"model": MODEL_NAME, "prompt": ["a", "b"], "max_tokens": 1}
    with (
        start(folder, key_requests_per_minute=2) as (running, http),
        OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
    ):
        client.completions.create(**ask)
        with pytest.raises(RateLimitError) as caught:
            client.completions.create(**ask)
        headers = caught.value.response.headers
        assert 20 <= int(headers["retry-after"]) <= 30  # for the first prompt: the body is not read
        assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", "0")
        assert (caught.value.type, caught.value.code) == ("rate_limit_error", "rate_limit_exceeded")
    with (
        start(folder, key_requests_per_minute=40) as (running, http),
        OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=1) as client,
    ):
        many = PROMPT | {"prompt": ["a"] * 40, "max_tokens": 1}
        http.post(COMPLETIONS, json=many).raise_for_status()
        began = time.monotonic()
        client.completions.create(model=MODEL_NAME, prompt="x", max_tokens=1)
        assert time.monotonic() - began >= 0.95


def test_overload_is_refused_before_the_body_is_there(folder, monkeypatch):
    """A client that is refused need not send its prompt first."""
    engine = EngineConfig(kv_bytes="4MiB", page_size=16, num_threads=1, max_waiting=1, max_sequences=1)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n{{"
    for options, code in (({"max_requests": 1}, b"queue_full"), ({"key_max_requests": 1}, b"rate_limit_exceeded")):
        with start(folder, **options) as (running, client), client.stream("POST", COMPLETIONS, json=ENDLESS) as held:
            slow_down(running, monkeypatch)
            assert held.status_code == 200
            answer = ask_with_half_a_body(running, head)
            assert b" 429 " in answer
            assert code in answer
    with start(folder, engine=engine) as (running, client):
        slow_down(running, monkeypatch)
        body = json.dumps(ENDLESS).encode()
        connections = []
        for state in ("num_running", "num_waiting"):
            connections.append(socket.create_connection(("127.0.0.1", running.port), timeout=10))
            connections[-1].sendall(head.replace("100000", str(len(body)))[:-1].encode() + body)
            wait_until(lambda: client.get("/status").json()["workers"][0]["engine"][state] == 1)  # noqa: B023
        answer = ask_with_half_a_body(running, head)
        assert b" 429 " in answer
        assert b"engine.max_waiting" in answer
        assert b"retry-after: " in answer
        for connection in connections:
            connection.close()


def ask_with_half_a_body(running: LocalServer, head: str) -> bytes:
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(head.encode())
        answer = b""
        while b"}}" not in answer:
            received = connection.recv(4096)
            assert received, answer
            answer += received
        return answer


def test_every_503_says_when_to_come_again(folder, monkeypatch):
    with start(folder) as (running, client), monkeypatch.context() as patch:
        patch.setattr(running.engine, "step", lambda: 1 / 0)
        failed = client.post(COMPLETIONS, json=PROMPT)
        message = check_error(failed, 503, code="generation_failed")
        assert "division" not in message  # others in the same step are told, too
        assert int(failed.headers["retry-after"]) >= 1


def cached_tokens(client: httpx.Client, headers: dict[str, str], salt: str | None) -> int:
    fields = PROMPT | {"prompt": "x" * 200 + "What follows is cached.", "max_tokens": 1, "cache_salt": salt}
    usage = client.post(COMPLETIONS, json=fields, headers=headers).raise_for_status().json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"]


def test_tenants_do_not_find_each_others_prefixes(folder, key_file):
    with start(folder, api_key_file=key_file) as (_, client):
        for salt in (None, "bob\0", "s"):
            assert [cached_tokens(client, headers, salt) for headers in (ALICE, BOB)] == [0, 0]
            assert cached_tokens(client, ALICE, salt) > 100
            assert cached_tokens(client, BOB, salt) > 100


def test_prefixes_are_shared_where_it_is_asked_for(folder, key_file):
    with start(folder, api_key_file=key_file, share_prefix_cache=True) as (_, client):
        assert cached_tokens(client, ALICE, None) == 0
        assert cached_tokens(client, BOB, None) > 100
        assert cached_tokens(client, BOB, "own") == 0


def test_a_revoked_key_is_refused_without_a_restart(folder, key_file):
    with start(folder, api_key_file=key_file) as (_, client):
        assert client.get("/v1/models", headers=ALICE).status_code == 200
        with open(key_file) as file:
            kept = [line for line in file if not line.startswith("alice")]
        with open(key_file, "w") as file:
            file.writelines(kept)
        wait_until(lambda: client.get("/v1/models", headers=ALICE).status_code == 401, 5)
        assert client.get("/v1/models", headers=BOB).status_code == 200
