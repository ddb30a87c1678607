"""/openapi.json is true: what it allows is taken, what it forbids is refused, and answers are as it says."""

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from cluster.config import ServerConfig
from cluster.endpoint import make_app
from cluster.fields import Reader
from cluster.local_backend import LocalBackend
from cluster.openai_schema import chat_readers, completion_readers
from cluster.serving import ServedModel
from longctx.engine.config import EngineConfig
from longctx.errors import RequestError
from tests.local_server import MODEL_NAME, LocalServer, check_error, serve
from tests.tiny_checkpoints import make_checkpoint

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = {"model": MODEL_NAME, "prompt": "The sky is", "max_tokens": 4}
TALK = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
KEY = "correct-horse"
HEADERS = {"authorization": f"Bearer {KEY}"}
GENERATE = ["create_completion", "create_chat_completion"]
TELL = ["list_models", "get_model", "get_status", "get_health", "get_metrics", "get_description"]
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [(name, POSITIVE) for name in GENERATE + TELL] + [(name, NEGATIVE) for name in GENERATE]
# 503 and 504 are described. A body that is as described may break a rule between fields, or be too long.
NOT_CHECKED = {"not_a_server_error", "positive_data_acceptance", "ignored_auth"}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[LocalServer]:
    """A context of 128 tokens: whatever is asked for ends soon."""
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", seed=3)
    engine = EngineConfig(kv_bytes="64KiB", page_size=16, num_threads=1)
    with serve(folder, engine=engine, server=ServerConfig(api_keys=[KEY])) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30, headers=HEADERS) as made:
        yield made


@pytest.fixture(scope="module")
def document(client) -> dict[str, Any]:
    return client.get("/openapi.json").raise_for_status().json()


@pytest.fixture(scope="module")
def api(server, document) -> Any:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    return schema


def check_requests(api: Any, operation: str, mode: GenerationMode, *, num_examples: int) -> None:
    """Ask ``num_examples`` times; every answer is a described one, and none says that something was not foreseen."""
    checks = [CHECKS.get_one(name) for name in CHECKS.get_all_names() if name not in NOT_CHECKED]

    @given(case=api.find_operation_by_id(operation).as_strategy(generation_mode=mode))
    @settings(
        max_examples=num_examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    def check(case: Any) -> None:
        if mode == POSITIVE:  # mostly far below a second, which would be all that is tested
            case.headers.pop("x-request-timeout", None)
            if isinstance(case.body, dict):
                case.body.pop("timeout", None)
        response = case.call(headers=HEADERS)
        case.validate_response(response, checks=checks)
        assert b"internal_error" not in response.content
        if response.headers.get("content-type") == ["text/event-stream; charset=utf-8"]:
            check_events(api.raw_schema, operation, response.text)

    check()


def check_events(document: dict[str, Any], operation: str, text: str) -> None:
    """A stream's events are described, too."""
    path = COMPLETIONS if operation == "create_completion" else CHAT
    content = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    validator = Draft202012Validator({"components": document["components"]} | content["x-item-schema"])
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events
    for event in events:
        if event != "[DONE]":
            validator.validate(json.loads(event))


@pytest.mark.parametrize("operation, mode", CASES, ids=str)
def test_requests_of_every_kind(api, operation: str, mode: GenerationMode) -> None:
    check_requests(api, operation, mode, num_examples=30 if operation in GENERATE else 5)


@pytest.mark.slow
@pytest.mark.parametrize("operation, mode", CASES, ids=str)
def test_many_requests_of_every_kind(api, operation: str, mode: GenerationMode) -> None:
    check_requests(api, operation, mode, num_examples=100 if operation in GENERATE else 20)


def test_the_document_is_one(api, document) -> None:
    api.validate()
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_every_route_is_described(server, document) -> None:
    model = ServedModel(MODEL_NAME, created=0, max_context=128, vocab_size=260)
    app = make_app(LocalBackend(server.engine, model, tokenizer=server.engine.tokenizer), ServerConfig())
    routes = {(route.path.replace(":path", ""), (route.methods - {"HEAD"}).pop().lower()) for route in app.routes}
    described = {
        (path, method)
        for path, item in document["paths"].items()
        for method in item.keys() & {"get", "post", "put", "delete"}
    }
    assert routes == described


def test_keys(server, document) -> None:
    """What needs one says so."""
    with httpx.Client(base_url=server.url, timeout=30) as stranger:
        for path, item in document["paths"].items():
            method, operation = next((name, item[name]) for name in ("get", "post") if name in item)
            response = stranger.request(method, path.format(name=MODEL_NAME))
            if operation.get("security", document["security"]):
                check_error(response, 401, code="invalid_api_key")
                assert response.headers["www-authenticate"]
            else:
                assert response.status_code == 200


ANSWERS = [
    (COMPLETIONS, PROMPT | {"n": 2, "logprobs": 3}),
    (COMPLETIONS, PROMPT | {"prompt": ["a", "b"], "echo": True}),
    (CHAT, TALK | {"n": 2, "logprobs": True, "top_logprobs": 2}),
    (CHAT, TALK),
]


@pytest.mark.parametrize("usage", [{}, {"stream_options": {"include_usage": True}}], ids=["plain", "usage"])
@pytest.mark.parametrize("path, fields", ANSWERS)
def test_answers(client, document, path: str, fields: dict[str, Any], usage: dict[str, Any]) -> None:
    """Whole and streamed."""
    operation = document["paths"][path]["post"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    answer = client.post(path, json=fields).raise_for_status().json()
    Draft202012Validator({"components": document["components"]} | schema).validate(answer)
    streamed = client.post(path, json=fields | usage | {"stream": True}).raise_for_status()
    check_events(document, operation["operationId"], streamed.text)


WHOLE = st.one_of(st.integers(-3, 300), st.sampled_from([2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), -(2**64)]))
PARTS = st.one_of(st.floats(-150, 150).map(lambda value: math.floor(value) + 0.5), st.sampled_from([1e-9, 1e30]))
# JSON Schema takes 1.0 for a whole number, the endpoint does not.
SCALARS = st.one_of(st.none(), st.booleans(), WHOLE, PARTS, st.sampled_from(["", "a", "none", "text", "\U0001f600"]))
KEYS = st.sampled_from(
    ["window", "group_size", "include_usage", "type", "1", "01", "-1", "a", "chat_template", "tools"]
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=18) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=20
)
MODEL = ServedModel(MODEL_NAME, created=0, max_context=128, vocab_size=10**11)  # whatever logit_bias' pattern has
READERS = completion_readers(MODEL) | {f"chat.{name}": reader for name, reader in chat_readers(MODEL).items()}
# What a mapping must hold is read elsewhere.
CHECKED_LATER = ("stream_options", "chat.stream_options", "chat.response_format", "chat.chat_template_kwargs")


@pytest.mark.parametrize("name", sorted(READERS.keys() - set(CHECKED_LATER)))
def test_a_field_is_taken_where_its_schema_says_so(name: str) -> None:
    reader = READERS[name]
    validator = Draft202012Validator(reader.schema)

    @given(value=VALUES)
    @settings(max_examples=50, derandomize=True, deadline=None)
    def check(value: Any) -> None:
        assert is_taken(reader, value) == (value is not None and validator.is_valid(value))

    check()


def is_taken(reader: Reader, value: Any) -> bool:
    """Whether the endpoint takes the value."""
    try:
        return reader(value, "field") is not None
    except RequestError:
        return False
