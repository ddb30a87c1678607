"""What the endpoint refuses: every bad field, body, path and method, with its status and the field's name."""

import asyncio
import difflib
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cluster.config import ServerConfig
from cluster.fields import bad_value
from cluster.openai_errors import ApiError
from cluster.openai_schema import parse_completion
from cluster.request_body import read_body
from cluster.serving import ServedModel
from longctx.errors import RequestError
from tests.local_server import MODEL_NAME, LocalServer, check_error, serve
from tests.tiny_checkpoints import make_checkpoint

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = {"model": MODEL_NAME, "prompt": "The sky is"}
TALK = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[LocalServer]:
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", seed=3)
    with serve(folder, server=ServerConfig(max_body_bytes="64KiB")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as made:
        yield made


BAD_FIELDS = [
    ({"prompt": ""}, "prompt", None),
    ({"prompt": []}, "prompt", None),
    ({"prompt": [[]]}, "prompt", None),
    ({"prompt": None}, "prompt", None),
    ({"prompt": 7}, "prompt", None),
    ({"prompt": ["a", [1]], "n": 1.5}, "n", None),
    ({"prompt": [1, "a"]}, "prompt", None),
    ({"prompt": [True]}, "prompt", None),
    ({"prompt": [-1]}, "prompt", None),
    ({"prompt": [260]}, "prompt", None),
    ({"prompt": ["a"] * 257}, "prompt", None),
    ({"prompt": "x" * 1024}, "prompt", "context_length_exceeded"),
    ({"prompt": "half \ud83d"}, "prompt", None),
    ({"model": None}, "model", None),
    ({"model": 3}, "model", None),
    ({"max_tokens": 0}, "max_tokens", None),
    ({"max_tokens": "12"}, "max_tokens", None),
    ({"max_tokens": True}, "max_tokens", None),
    ({"min_tokens": -1}, "min_tokens", None),
    ({"min_tokens": 20, "max_tokens": 10}, "min_tokens", None),
    ({"temperature": -0.1}, "temperature", None),
    ({"temperature": 2.1}, "temperature", None),
    ({"temperature": "hot"}, "temperature", None),
    ({"top_p": 0}, "top_p", None),
    ({"top_p": 1.01}, "top_p", None),
    ({"top_k": -2}, "top_k", None),
    ({"min_p": 1.5}, "min_p", None),
    ({"n": 0}, "n", None),
    ({"n": 129}, "n", None),
    ({"best_of": 2}, "best_of", None),
    ({"suffix": "end"}, "suffix", None),
    ({"logprobs": 21}, "logprobs", None),
    ({"logprobs": True}, "logprobs", None),
    ({"logprobs": 1, "echo": True}, "echo", None),
    ({"stop": ""}, "stop", None),
    ({"stop": ["x"] * 17}, "stop", None),
    ({"stop": [1]}, "stop", None),
    ({"stop_token_ids": [260]}, "stop_token_ids", None),
    ({"seed": 2**64}, "seed", None),
    ({"presence_penalty": 3}, "presence_penalty", None),
    ({"repetition_penalty": 0}, "repetition_penalty", None),
    ({"logit_bias": {"260": 1}}, "logit_bias", None),
    ({"logit_bias": {"a": 1}}, "logit_bias", None),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", None),
    ({"stream": "yes"}, "stream", None),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter"),
    ({"temprature": 1}, "temprature", "unknown_parameter"),
    ({"attention": 16}, "attention", None),
    ({"attention": {"groups": 16}}, "attention", None),
    ({"attention": {"window": 0}}, "attention.window", None),
    ({"attention": {"window": 64}}, "attention", None),  # the model is served with dense attention
]


@pytest.mark.parametrize("stream", [{}, {"stream": True}], ids=["whole", "stream"])
@pytest.mark.parametrize("fields,param,code", BAD_FIELDS, ids=[json.dumps(row[0])[:40] for row in BAD_FIELDS])
def test_bad_completion_field(client, fields, param, code, stream):
    if "stream_options" in fields or "stream" in fields:
        stream = {}
    check_error(client.post(COMPLETIONS, content=json.dumps(PROMPT | stream | fields)), 400, param=param, code=code)


BAD_CHAT_FIELDS = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0]",
    ),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages[0].content"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize("fields,param", BAD_CHAT_FIELDS, ids=[json.dumps(row[0])[:50] for row in BAD_CHAT_FIELDS])
def test_bad_chat_field(client, fields, param):
    check_error(client.post(CHAT, content=json.dumps(TALK | fields)), 400, param=param)


def test_errors_say_what_is_allowed(client):
    message = check_error(client.post(COMPLETIONS, json=PROMPT | {"temperature": 9}), 400, param="temperature")
    assert "temperature=9" in message
    assert "from 0 up to 2" in message
    message = check_error(
        client.post(COMPLETIONS, json=PROMPT | {"max_tokns": 9}), 400, param="max_tokns", code="unknown_parameter"
    )
    assert "max_tokens" in message
    message = check_error(
        client.post(CHAT, json=TALK | {"messages": [{"role": "user", "content": "x" * 2000}]}),
        400,
        param="messages",
        code="context_length_exceeded",
    )
    assert "1024" in message
    for path, param, fields in (
        (COMPLETIONS, "prompt", PROMPT | {"prompt": "x" * 60_000}),
        (CHAT, "messages", TALK | {"messages": [{"role": "user", "content": "x" * 60_000}]}),
    ):
        message = check_error(client.post(path, json=fields), 400, param=param, code="context_length_exceeded")
        assert "characters, which are more than 1024 tokens" in message  # not tokenised for this


def test_harmless_fields_are_taken(client):
    fields = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "tools": [], "stop": None}
    client.post(CHAT, json=TALK | fields | {"max_tokens": 2}).raise_for_status()


@pytest.mark.parametrize(
    "body,words",
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"prompt": NaN}', "NaN"),
        (b"[1]", "object"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"a":' * 100_00 + b"1" + b"}" * 100_00, "nested"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "JSON"),
        ('{"model": "tiny"}'.encode("utf-16"), "UTF-8"),
    ],
    ids=["empty", "cut", "nan", "list", "utf8", "deep", "digits", "utf16"],
)
def test_malformed_body(client, body, words):
    assert words in check_error(client.post(COMPLETIONS, content=body), 400)


def test_unknown_model_path_and_method(client):
    other = PROMPT | {"model": "other"}
    message = check_error(client.post(COMPLETIONS, json=other), 404, param="model", code="model_not_found")
    assert MODEL_NAME in message
    check_error(client.get("/v1/models/other"), 404, param="model", code="model_not_found")
    check_error(client.get("/v1/nothing"), 404, code="unknown_url")
    response = client.get(COMPLETIONS)
    check_error(response, 405, code="method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_a_long_name_is_not_compared(monkeypatch):
    """To look for what a name of megabytes may have meant would hold up everybody else."""
    compared = []
    monkeypatch.setattr(difflib, "get_close_matches", lambda name, *_, **__: compared.append(name) or [])
    model = ServedModel(MODEL_NAME, created=0, max_context=64, vocab_size=260)
    with pytest.raises(RequestError) as caught:
        parse_completion(PROMPT | {"x" * 10_000_000: 1}, model, max_prompts=1)
    assert len(str(caught.value)) < 2000
    with pytest.raises(RequestError):
        parse_completion(PROMPT | {"stream": True, "stream_options": {"x" * 10_000_000: 1}}, model, max_prompts=1)
    assert [len(name) for name in compared] == [80, 80]


def test_quoting_looks_at_the_first_keys_only():
    """An object with a million keys is not sorted for four of them."""

    class Key(str):
        __slots__ = ()

        def __lt__(self, other):
            compared.append(self)
            return super().__lt__(other)

    compared: list[Key] = []
    text = str(bad_value("stop", {Key(number): 1 for number in range(10_000)}, "a string"))
    assert text.startswith("stop={'0': 1, '1': 1")
    assert len(compared) < 100


@pytest.mark.parametrize("length", [b"9" * 5000, b"9" * 21, b"99999"])
def test_a_length_of_any_size(length):
    """Not every HTTP server that hands requests on refuses lengths that Python cannot read."""

    async def read() -> None:
        with pytest.raises(ApiError) as caught:
            await read_body({"headers": [(b"content-length", length)]}, receive, max_bytes=1 << 16)
        assert caught.value.status == 413

    async def receive() -> dict[str, Any]:
        raise AssertionError("nothing of it is read")

    asyncio.run(read())


def test_too_large_body(client):
    check_error(client.post(COMPLETIONS, json=PROMPT | {"prompt": "x" * 70_000}), 413, code="body_too_large")


def test_too_large_chunked_body(client, server):
    """Without a length the body is counted as it comes; the answer comes although the client never ends its body."""

    def pieces() -> Iterator[bytes]:
        yield from [b"x" * 1024] * 80

    check_error(client.post(COMPLETIONS, content=pieces()), 413, code="body_too_large")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        connection.sendall(b"11000\r\n" + b"x" * 0x11000 + b"\r\n")
        assert b" 413 " in connection.recv(4096)
        while connection.recv(4096):
            pass  # the server closes
