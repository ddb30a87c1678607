"""The endpoint's OpenAPI description, made of the readers that check requests, so that it says what they take.

It describes fields one by one. Rules between them (``top_logprobs`` needs ``logprobs``), the context's length and what
a chat template takes are left out: a body that breaks one of them is answered with 400. OpenAPI 3.1 has no word for a
stream's events; ``x-item-schema`` is their schema, as 3.2's ``itemSchema``.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import longctx
from cluster.config import ServerConfig
from cluster.deadline import HEADER, timeout_reader
from cluster.fields import Schema, nullable
from cluster.openai_schema import HARMLESS, chat_readers, completion_readers, message_schema, prompt_schema
from cluster.serving import QueueStats, ServedModel

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
TRUTH: Schema = {"type": "boolean"}
ANYTHING: Schema = {}

# What a status means, and the headers that come with it.
STATUSES: dict[int, tuple[str, tuple[str, ...]]] = {
    400: ("a field, a header or the body is not as it must be; `param` names the field", ()),
    401: ("an API key is missing or not known", ("www-authenticate",)),
    404: ("this model is not served here", ()),
    408: ("the body did not arrive in time", ()),
    413: ("the body is larger than server.max_body_bytes", ()),
    429: ("there is no place in the queue, or the key's limits are reached", ("retry-after",)),
    503: ("no worker can answer now, or one failed", ("retry-after",)),
    504: ("the request took longer than it gave", ("x-should-retry",)),
}
GENERATES = (400, 401, 404, 408, 413, 429, 503, 504)


def describe_api(model: ServedModel, server: ServerConfig, *, max_prompts: int, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document of an endpoint.

    Args:
        model: that it serves.
        server: limits.
        max_prompts: that one request may hold.
        needs_key: whether an API key must be shown.
    """
    timeout = timeout_reader(server.request_timeout_s).schema
    completion = _body({"prompt": prompt_schema(model, max_prompts)}, completion_readers(model), model, timeout)
    chat = _body({"messages": message_schema()}, chat_readers(model), model, timeout)
    return {
        "openapi": "3.1.0",
        "info": {"title": "longctx", "version": longctx.__version__, "license": {"name": "Apache-2.0"}},
        "paths": {
            "/v1/completions": {"post": _generate("completion", timeout)},
            "/v1/chat/completions": {"post": _generate("chat_completion", timeout)},
            "/v1/models": {"get": _get("list_models", "What is served", "model_list")},
            "/v1/models/{name}": {
                "parameters": [_parameter("name", "path", TEXT, is_required=True)],
                "get": _get("get_model", "The model, if it is served", "model", (404,)),
            },
            "/status": {"get": _get("get_status", "What longctx status shows", "status")},
            "/health": {"get": _health()},
            "/metrics": {"get": _metrics()},
            "/openapi.json": {"get": _get("get_description", "This description", "anything")},
        },
        "components": {
            "schemas": {"completion_request": completion, "chat_completion_request": chat} | _answers(),
            "responses": {str(status): _failure(*meaning) for status, meaning in STATUSES.items()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if needs_key else [],
    }


def _body(prompt: Mapping[str, Schema], readers: Mapping[str, Any], model: ServedModel, timeout: Schema) -> Schema:
    """A request's body: two fields must be there, the others may also be null."""
    optional = {name: nullable(reader.schema) for name, reader in readers.items()} | dict.fromkeys(HARMLESS, ANYTHING)
    properties = optional | {"timeout": nullable(timeout), "model": {"enum": [model.name]}} | dict(prompt)
    required = ["model", *prompt]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _generate(name: str, timeout: Schema) -> dict[str, Any]:
    good = _response("The answer, or with stream=true its events, the last of which is [DONE]", name)
    events = {"anyOf": [_ref(f"{name}_chunk"), _ref("error")]}
    good["content"]["text/event-stream"] = {"x-item-schema": events}
    good["headers"] = _headers(["x-request-id"])
    return {
        "operationId": f"create_{name}",
        "parameters": [_parameter(HEADER, "header", timeout)],
        "requestBody": {"required": True, "content": _content(f"{name}_request")},
        "responses": {"200": good, **_errors(GENERATES)},
    }


def _get(operation: str, text: str, schema: str, statuses: Sequence[int] = ()) -> dict[str, Any]:
    return {"operationId": operation, "responses": {"200": _response(text, schema), **_errors((401, *statuses))}}


def _health() -> dict[str, Any]:
    answers = {"200": _response("Requests can be served", "health"), "503": _response("They cannot", "health")}
    return {"operationId": "get_health", "security": [], "responses": answers}


def _metrics() -> dict[str, Any]:
    good = {"description": "For Prometheus", "content": {"text/plain": {"schema": TEXT}}}
    return {"operationId": "get_metrics", "security": [], "responses": {"200": good}}


def _parameter(name: str, place: str, schema: Schema, *, is_required: bool = False) -> dict[str, Any]:
    return {"name": name, "in": place, "required": is_required, "schema": schema}


def _errors(statuses: Sequence[int]) -> dict[str, Any]:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _response(text: str, schema: str) -> dict[str, Any]:
    return {"description": text, "content": _content(schema)}


def _failure(text: str, headers: Sequence[str]) -> dict[str, Any]:
    return _response(text, "error") | ({"headers": _headers(headers)} if headers else {})


def _headers(names: Sequence[str]) -> dict[str, Any]:
    return {name: {"required": True, "schema": TEXT} for name in names}


def _content(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(schema)}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(**properties: Schema) -> Schema:
    """With exactly these properties."""
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _answers() -> dict[str, Schema]:
    """What is answered, by name."""
    usage = _object(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=_object(cached_tokens=COUNT),
    )
    reason: Schema = {"enum": ["stop", "length"]}
    ended = nullable(reason)
    logprobs, chat_logprobs = nullable(_completion_logprobs()), nullable(_chat_logprobs())
    message: dict[str, Schema] = {"role": {"const": "assistant"}, "content": TEXT, "refusal": {"type": "null"}}
    delta = _object(**message) | {"required": []}
    return {
        "anything": ANYTHING,
        "error": _object(error=_object(message=TEXT, type=TEXT, param=nullable(TEXT), code=nullable(TEXT))),
        "completion": _answer("text_completion", usage, text=TEXT, logprobs=logprobs, finish_reason=reason),
        "completion_chunk": _chunk("text_completion", usage, text=TEXT, logprobs=logprobs, finish_reason=ended),
        "chat_completion": _answer(
            "chat.completion", usage, message=_object(**message), logprobs=chat_logprobs, finish_reason=reason
        ),
        "chat_completion_chunk": _chunk(
            "chat.completion.chunk", usage, delta=delta, logprobs=chat_logprobs, finish_reason=ended
        ),
        "model": (model := _model()),
        "model_list": _object(object={"const": "list"}, data=_list(_ref("model"))),
        "health": _object(
            status={"enum": ["ready", "not ready"]},
            reason=TEXT,
            model=TEXT,
            workers=_list(_object(name=TEXT, role=TEXT, ready=TRUTH, reason=TEXT)),
        ),
        "status": _object(
            model=model,
            ready=TRUTH,
            reason=TEXT,
            requests_in_progress=COUNT,
            max_requests=COUNT,
            queue=_object(**{field.name: COUNT for field in dataclasses.fields(QueueStats)}),
            pools=_list(_pool()),
            autoscaler_silence_s=nullable(NUMBER),
            workers=_list(_worker()),
        ),
    }


def _answer(kind: str, usage: Schema, **choice: Schema) -> Schema:
    choices = _list(_object(index=COUNT, **choice))
    return _object(id=TEXT, object={"const": kind}, created=COUNT, model=TEXT, choices=choices, usage=usage)


def _chunk(kind: str, usage: Schema, **choice: Schema) -> Schema:
    """An event of a stream; the one with the usage has no choices."""
    chunk = _answer(kind, nullable(usage), **choice)
    return chunk | {"required": [name for name in chunk["required"] if name != "usage"]}


def _completion_logprobs() -> Schema:
    by_text: Schema = {"type": "object", "additionalProperties": NUMBER}
    return _object(
        tokens=_list(TEXT), token_logprobs=_list(NUMBER), top_logprobs=_list(by_text), text_offset=_list(COUNT)
    )


def _chat_logprobs() -> Schema:
    entry = {
        "token": TEXT,
        "logprob": NUMBER,
        "bytes": nullable(_list({"type": "integer", "minimum": 0, "maximum": 255})),
    }
    return _object(content=_list(_object(**entry, top_logprobs=_list(_object(**entry)))), refusal={"type": "null"})


def _model() -> Schema:
    return _object(id=TEXT, object={"const": "model"}, created=COUNT, owned_by=TEXT, max_model_len=COUNT)


def _pool() -> Schema:
    """Of a pool that which is there without autoscaling, too."""
    names = {"role": TEXT, "num_live": COUNT, "num_starting": COUNT, "num_draining": COUNT}
    return {"type": "object", "properties": names, "required": list(names)}


def _worker() -> Schema:
    """Of a worker that which does not change from version to version."""
    names = {"name": TEXT, "role": TEXT, "alive": TRUTH, "draining": TRUTH, "engine": {"type": "object"}}
    return {"type": "object", "properties": names, "required": list(names)}
