"""What clients send and get is in no log, at any level: requests that are served, refused, given up, and that fail."""

import asyncio
import dataclasses
import json
import logging
import socket
import traceback

import httpx
import pytest

from cluster.config import ServerConfig
from longctx.engine.engine import Engine
from longctx.messages import FirstTokens, GenerationRequest, OutputDelta, SamplingParams, TokenLogprob
from tests.cli_server import wait_until
from tests.cluster.small_cluster import make_config, start_cluster
from tests.local_server import MODEL_NAME, serve
from tests.tiny_checkpoints import make_checkpoint

SECRET = "plutonium-mosaic"
IDS = list(SECRET.encode())  # a byte is a token
RUN = 4  # so many of the ids one after another are no accident
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = {"model": MODEL_NAME, "prompt": f"tell {SECRET}", "max_tokens": 8, "ignore_eos": True}
TALK = {"model": MODEL_NAME, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 8}
BAD = [
    PROMPT | {"temperature": SECRET},
    PROMPT | {"stop": [[SECRET]]},
    PROMPT | {SECRET: 1},
    PROMPT | {"prompt": SECRET * 100},
    PROMPT | {"model": SECRET},
    PROMPT | {"prompt": [[SECRET]]},
    PROMPT | {"prompt": [*IDS, 999]},
    PROMPT | {"timeout": SECRET},
    PROMPT | {"logit_bias": {SECRET: 1}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", seed=3)


@pytest.fixture
def logged(caplog, monkeypatch) -> pytest.LogCaptureFixture:
    """Everything that anybody logs."""
    caplog.set_level(logging.DEBUG)
    known = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    for each in known:
        if not each.name.startswith(("httpcore", "httpx", "openai")):  # clients of the tests
            monkeypatch.setattr(each, "level", logging.DEBUG)
            monkeypatch.setattr(each, "propagate", True)
            monkeypatch.setattr(each, "disabled", False)
            each.manager._clear_cache()  # type: ignore[attr-defined]
    return caplog


def find_leaks(records: list[logging.LogRecord]) -> list[str]:
    """Lines that have the secret's text, or its ids."""
    runs = [IDS[start : start + RUN] for start in range(len(IDS) - RUN + 1)]
    traces = [
        SECRET,
        SECRET[:8],
        *(", ".join(map(str, run)) for run in runs),
        *(" ".join(map(str, run)) for run in runs),
    ]
    lines = []
    for record in records:
        text = f"{record.getMessage()} {record.args!r} {record.stack_info or ''}"
        if record.exc_info and record.exc_info[1]:
            text += "".join(traceback.format_exception(record.exc_info[1]))
        lines.append(text)
    return [line for line in lines if any(trace in line for trace in traces)]


def test_the_test_finds_a_leak(logged):
    logging.getLogger("cluster.routes").debug("%s", [*IDS])
    logging.getLogger("ray").debug("prompt %s", SECRET)
    try:
        raise ValueError(f"no {SECRET}")
    except ValueError:
        logging.getLogger("longctx.engine").exception("it failed")
    assert len(find_leaks(logged.records)) == 3


def test_the_endpoint_and_its_engine(folder, logged, monkeypatch):
    options = ServerConfig(api_keys=[SECRET], max_body_bytes="64KiB")
    headers = {"authorization": f"Bearer {SECRET}"}
    with (
        serve(folder, server=options) as running,
        httpx.Client(base_url=running.url, timeout=30, headers=headers) as client,
    ):
        for body in (PROMPT, PROMPT | {"prompt": IDS, "logprobs": 3, "echo": False, "cache_salt": SECRET}):
            for stream in (False, True):
                client.post(COMPLETIONS, json=body | {"stream": stream, "stop": [SECRET]}).raise_for_status()
        for stream in (False, True):
            client.post(CHAT, json=TALK | {"stream": stream}).raise_for_status()
        for body in BAD:
            assert client.post(COMPLETIONS, json=body).status_code in (400, 404), body
        assert client.post(COMPLETIONS, content=f"{{{SECRET}").status_code == 400
        assert client.post(COMPLETIONS, json=PROMPT | {"prompt": SECRET * 10_000}).status_code == 413
        assert client.get("/v1/models", headers={"authorization": f"Bearer {SECRET}x"}).status_code == 401
        late = PROMPT | {"n": 32, "max_tokens": 900, "timeout": 0.3}
        assert client.post(COMPLETIONS, json=late).status_code == 504
        leave_early(running.port, headers, late | {"timeout": 20})
        wait_until(lambda: client.get("/status").json()["requests_in_progress"] == 0)
        with monkeypatch.context() as patch:  # a defect that shows what it was about
            patch.setattr(running.engine, "step", lambda: fail_about(running.engine))
            for stream in (False, True):
                failed = client.post(COMPLETIONS, json=PROMPT | {"stream": stream})
                assert failed.status_code == 503
                assert SECRET not in failed.text
        with monkeypatch.context() as patch:
            patch.setattr("cluster.routes.make_requests", lambda *args, **kwargs: args[1].unknown)
            assert client.post(COMPLETIONS, json=PROMPT).status_code == 503
    assert any("a step failed" in record.getMessage() for record in logged.records)
    assert any("a request failed" in record.getMessage() for record in logged.records)
    assert not find_leaks(logged.records)


def fail_about(engine: Engine) -> None:
    """Raise an error whose text has every request in flight."""
    raise RuntimeError(f"cannot go on with {[active.request for active in engine._requests.values()]}")


def leave_early(port: int, headers: dict[str, str], fields: dict) -> None:
    """A client that goes away while it is served."""
    body = json.dumps(fields).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nauthorization: {headers['authorization']}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)


def test_router_and_workers(folder, logged, monkeypatch):
    """Prompts that travel, that arrive broken, and that a worker cannot compute."""

    async def run() -> None:
        async with start_cluster(make_config(folder)) as cluster:
            params = SamplingParams(
                max_tokens=8, temperature=0, logprobs=2, stop=(SECRET,), logit_bias=((IDS[0], 1.0),)
            )
            request = GenerationRequest("first", tuple(IDS * 8), params, cache_salt=SECRET)
            await cluster.answer(request)
            engine = cluster.workers["prefill-0"].engine
            with monkeypatch.context() as patch:
                patch.setattr(engine, "step", lambda: fail_about(engine))
                await cluster.answer(dataclasses.replace(request, request_id="second", prompt_token_ids=tuple(IDS * 9)))

    asyncio.run(run())
    assert any("did not arrive" in record.getMessage() for record in logged.records)
    assert not find_leaks(logged.records)


def test_what_travels_does_not_show_what_it_carries():
    params = SamplingParams(stop=(SECRET,), stop_token_ids=tuple(IDS), logit_bias=tuple((each, 1.0) for each in IDS))
    logprobs = (TokenLogprob(IDS[0], -1.0, tuple((each, -1.0) for each in IDS)),)
    shown = repr(
        [
            GenerationRequest("r", tuple(IDS), params, SECRET, (tuple(IDS),)),
            OutputDelta("r", 0, tuple(IDS), SECRET, logprobs, stop_reason=SECRET),
            FirstTokens(tuple(IDS), logprobs),
            ServerConfig(api_keys=[SECRET]),
        ]
    )
    assert SECRET not in shown
    assert ", ".join(map(str, IDS[:RUN])) not in shown
    assert f"({IDS[0]}, " not in shown
