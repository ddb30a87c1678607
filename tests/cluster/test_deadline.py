"""A request says how long it may take: in its body or its headers, whole or streamed."""

import json
from collections.abc import Iterator

import httpx
import pytest
from openai import APIStatusError, OpenAI

from cluster.config import ServerConfig
from tests.cli_server import wait_until
from tests.local_server import MODEL_NAME, LocalServer, check_error, serve
from tests.tiny_checkpoints import make_checkpoint

ROUTES = {
    "/v1/completions": {"model": MODEL_NAME, "prompt": "The sky is"},
    "/v1/chat/completions": {"model": MODEL_NAME, "messages": [{"role": "user", "content": "hello"}]},
}
LONG = {"max_tokens": 900, "ignore_eos": True, "n": 32}  # far longer than the deadlines here
LONGEST_S = 30.0


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[LocalServer]:
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", seed=3)
    with serve(folder, server=ServerConfig(request_timeout_s=LONGEST_S)) as running:
        yield running


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    """Every test leaves no page in use."""
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made
        wait_until(lambda: made.get("/status").json()["requests_in_progress"] == 0)
        wait_until(lambda: made.get("/status").json()["workers"][0]["engine"]["num_pages_used"] == 0)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"timeout": 0.5}, {}),
        ({}, {"x-request-timeout": "0.5"}),
        ({"timeout": 0.5}, {"x-request-timeout": "20"}),  # the field wins
        ({"timeout": None}, {"x-request-timeout": "0.5"}),
    ],
    ids=["field", "header", "both", "null"],
)
def test_a_whole_answer_that_is_late(client, path, fields, headers):
    response = client.post(path, json=ROUTES[path] | LONG | fields, headers=headers)
    message = check_error(response, 504, code="deadline_exceeded")
    assert "0.5 seconds" in message
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("path", ROUTES)
def test_a_stream_that_is_late(client, path):
    response = client.post(path, json=ROUTES[path] | LONG | {"stream": True, "timeout": 1})
    assert response.status_code == 200
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert len(events) > 1
    assert json.loads(events[-1])["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("path", ROUTES)
def test_the_field_wins_also_when_it_is_longer(client, path):
    response = client.post(path, json=ROUTES[path] | LONG | {"timeout": 1.5}, headers={"x-request-timeout": "0.75"})
    assert "1.5 seconds" in check_error(response, 504, code="deadline_exceeded")


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("value", [0, -1, "5", True, LONGEST_S + 1, [1]])
def test_a_field_that_is_no_time(client, path, value):
    message = check_error(client.post(path, json=ROUTES[path] | {"timeout": value}), 400, param="timeout")
    assert "above 0 up to 30" in message


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", "31", ""])
def test_a_header_that_is_no_time(client, value):
    response = client.post("/v1/completions", json=ROUTES["/v1/completions"], headers={"x-request-timeout": value})
    assert "above 0 up to 30" in check_error(response, 400, param="x-request-timeout")


def test_the_official_client_does_not_ask_again(client, server):
    """It would after other answers of 500 and above, and generate everything once more."""
    before = requests_by_now(client)
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2) as official,
        pytest.raises(APIStatusError) as caught,
    ):
        official.completions.create(
            model=MODEL_NAME, prompt="x", max_tokens=900, n=32, extra_body={"timeout": 0.3, "ignore_eos": True}
        )
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert requests_by_now(client) == before + 1


def requests_by_now(client: httpx.Client) -> float:
    """How many ended by their deadline."""
    lines = client.get("/metrics").text.splitlines()
    name = 'longctx_requests_total{endpoint="/v1/completions",outcome="deadline"}'
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
