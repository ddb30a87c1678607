"""The two request bodies of the OpenAI API, checked field by field.

A field that changes the answer and is not supported is refused, never ignored; only fields that cannot change it
(``HARMLESS``) are. Beyond OpenAI's there are vLLM's sampling extensions (``top_k``, ``min_p``, ``repetition_penalty``,
``min_tokens``, ``stop_token_ids``, ``ignore_eos``, ``cache_salt``, ``chat_template_kwargs``) and ours, ``attention``
and ``timeout``.
"""

import difflib
import math
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from cluster import fields
from cluster.fields import Reader, Schema, bad_value
from cluster.serving import ServedModel
from longctx.errors import RequestError
from longctx.messages import AttentionOptions, SamplingParams

MAX_N = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20
COUNT = 2**31 - 1  # "as many as you like"

HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",  # no tools, so nothing runs in parallel
    }
)

# Arguments of the renderer, not variables of a chat template.
RESERVED_KWARGS = frozenset({"self", "messages", "conversation", "chat_template", "tokenize", "tools", "documents"}) | {
    "return_dict",
    "return_tensors",
    "tokenizer_kwargs",
}

SAMPLING: dict[str, Reader] = {
    "n": fields.integer(1, MAX_N),
    "min_tokens": fields.integer(0, COUNT),
    "temperature": fields.number(0.0, 2.0),
    "top_p": fields.number(0.0, 1.0, above=True),
    "top_k": fields.integer(-1, COUNT),
    "min_p": fields.number(0.0, 1.0),
    "seed": fields.integer(-(2**63), 2**63 - 1),
    "stop": fields.strings(MAX_STOPS),
    "ignore_eos": fields.boolean,
    "presence_penalty": fields.number(-2.0, 2.0),
    "frequency_penalty": fields.number(-2.0, 2.0),
    "repetition_penalty": fields.number(0.0, 10.0, above=True),
    "attention": fields.options(
        AttentionOptions, {"group_size": fields.integer(1, COUNT), "window": fields.integer(1, COUNT)}
    ),
}
SHARED: dict[str, Reader] = SAMPLING | {
    "model": fields.string,
    "stream": fields.boolean,
    "stream_options": fields.described(
        fields.mapping,
        properties=dict.fromkeys(("include_usage", "include_obfuscation"), fields.nullable(fields.boolean.schema)),
        additionalProperties=False,
    ),
    "max_tokens": fields.integer(1, COUNT),
    "cache_salt": fields.string,
    "timeout": fields.number(0.0, math.inf, above=True),  # cluster/deadline.py knows the most, and read it before
}
COMPLETION: dict[str, Reader] = SHARED | {
    "echo": fields.boolean,
    "best_of": fields.integer(1, MAX_N),
    "suffix": fields.choice(""),
    "logprobs": fields.integer(0, MAX_LOGPROBS),
}
CHAT: dict[str, Reader] = SHARED | {
    "max_completion_tokens": fields.integer(1, COUNT),
    "logprobs": fields.boolean,
    "top_logprobs": fields.integer(0, MAX_LOGPROBS),
    "response_format": fields.described(fields.mapping, enum=[{"type": "text"}]),
    "chat_template_kwargs": fields.described(fields.mapping, propertyNames={"not": {"enum": sorted(RESERVED_KWARGS)}}),
    "modalities": fields.choice(["text"]),
    "tools": fields.choice([]),
    "tool_choice": fields.choice("none"),
    "functions": fields.choice([]),
    "function_call": fields.choice("none"),
}
MESSAGE_ROLES = ("system", "developer", "user", "assistant")

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """What both kinds of request say."""

    sampling: SamplingParams
    stream: bool
    include_usage: bool  # a last chunk with the usage
    cache_salt: str


@dataclass(frozen=True, slots=True)
class CompletionCall(Call):
    """A checked body of ``/v1/completions``."""

    prompts: tuple[Prompt, ...] = field(repr=False)
    echo: bool


@dataclass(frozen=True, slots=True)
class ChatCall(Call):
    """A checked body of ``/v1/chat/completions``."""

    messages: list[dict[str, Any]] = field(repr=False)
    template_kwargs: dict[str, Any] = field(repr=False)


def parse_completion(
    body: dict[str, Any], model: ServedModel, *, max_prompts: int, limit: str = "server.max_requests"
) -> CompletionCall:
    """The request in ``body``; raises ``RequestError`` naming the field at fault. ``limit`` is what the most is of."""
    prompts = _prompts(body.get("prompt"), model, max_prompts=max_prompts, limit=limit)
    values = _read_fields(
        {key: value for key, value in body.items() if key != "prompt"}, completion_readers(model), known="prompt"
    )
    if values.get("best_of", values.get("n", 1)) != values.get("n", 1):
        raise bad_value("best_of", values["best_of"], "every sequence is returned, so it must equal n")
    echo = values.get("echo", False)
    if echo and "logprobs" in values:
        raise RequestError("echo with logprobs is not supported: prompts have no log probabilities", param="echo")
    sampling = replace(
        _sampling(values, model), max_tokens=values.get("max_tokens", 16), logprobs=values.get("logprobs")
    )
    return CompletionCall(sampling, *_delivery(values), prompts=prompts, echo=echo)


def parse_chat(body: dict[str, Any], model: ServedModel) -> ChatCall:
    """The request in ``body``; raises ``RequestError`` naming the field at fault."""
    messages = _messages(body.get("messages"))
    values = _read_fields(
        {key: value for key, value in body.items() if key != "messages"}, chat_readers(model), known="messages"
    )
    response_format = values.get("response_format", {"type": "text"})
    if response_format != {"type": "text"}:
        raise bad_value("response_format", response_format, 'only {"type": "text"} is supported')
    template_kwargs = values.get("chat_template_kwargs", {})
    for name in RESERVED_KWARGS & set(template_kwargs):
        raise RequestError(f"chat_template_kwargs.{name} is not for requests to set", param="chat_template_kwargs")
    want_logprobs = values.get("logprobs", False)
    if "top_logprobs" in values and not want_logprobs:
        raise bad_value("top_logprobs", values["top_logprobs"], "it needs logprobs=true")
    max_tokens = values.get("max_completion_tokens", values.get("max_tokens"))
    logprobs = values.get("top_logprobs", 0) if want_logprobs else None
    sampling = replace(_sampling(values, model), max_tokens=max_tokens, logprobs=logprobs)
    return ChatCall(sampling, *_delivery(values), messages=messages, template_kwargs=template_kwargs)


def completion_readers(model: ServedModel) -> dict[str, Reader]:
    """Of the fields beside ``prompt``."""
    return COMPLETION | _of_tokens(model)


def chat_readers(model: ServedModel) -> dict[str, Reader]:
    """Of the fields beside ``messages``."""
    return CHAT | _of_tokens(model)


def _of_tokens(model: ServedModel) -> dict[str, Reader]:
    return {
        "logit_bias": fields.logit_bias(model.vocab_size),
        "stop_token_ids": fields.token_ids(model.vocab_size),
    }


def check_model(body: dict[str, Any]) -> str:
    """The model that ``body`` asks for."""
    if body.get("model") is None:
        raise RequestError("model is missing; /v1/models lists what is served", param="model")
    return fields.string(body["model"], "model")


def _read_fields(body: dict[str, Any], readers: dict[str, Reader], *, known: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in HARMLESS:
            continue
        if name not in readers:
            raise _unknown(name, [*readers, known])
        values[name] = readers[name](value, name)
    return values


def _unknown(name: str, allowed: list[str]) -> RequestError:
    close = difflib.get_close_matches(name[:80], allowed, n=3)  # the time it takes grows with the name
    hint = f"; did you mean {' or '.join(close)}?" if close else "; allowed: " + ", ".join(sorted(allowed))
    return RequestError(
        f"{name[:80]!r} is not a field that is supported here{hint}", param=name[:80], code="unknown_parameter"
    )


def _sampling(values: dict[str, Any], model: ServedModel) -> SamplingParams:
    chosen = {name: values[name] for name in (*SAMPLING, "logit_bias", "stop_token_ids") if name in values}
    if chosen.get("top_k") == -1:  # how vLLM's clients say "off"
        chosen["top_k"] = 0
    return replace(model.sampling, **chosen)


def _delivery(values: dict[str, Any]) -> tuple[bool, bool, str]:
    """``stream``, ``include_usage`` and ``cache_salt``."""
    stream = values.get("stream", False)
    options = values.get("stream_options", {})
    if options and not stream:
        raise RequestError("stream_options needs stream=true", param="stream_options")
    include_usage = False
    for name, value in options.items():
        if name not in ("include_usage", "include_obfuscation"):
            raise _unknown(
                f"stream_options.{name}", ["stream_options.include_usage", "stream_options.include_obfuscation"]
            )
        value = fields.boolean(value, f"stream_options.{name}") if value is not None else False
        include_usage = value if name == "include_usage" else include_usage
    return stream, include_usage, values.get("cache_salt", "")


def prompt_schema(model: ServedModel, max_prompts: int) -> Schema:
    """What ``_prompts`` takes."""
    text: Schema = {"type": "string", "minLength": 1}
    ids = fields.token_ids(model.vocab_size).schema | {"minItems": 1}
    many = [{"type": "array", "items": each, "minItems": 1, "maxItems": max_prompts} for each in (text, ids)]
    return {"anyOf": [text, ids, *many]}


def message_schema() -> Schema:
    """What ``_messages`` takes."""
    part = {"properties": {"type": {"const": "text"}, "text": fields.string.schema}, "required": ["type", "text"]}
    parts = {"type": "array", "items": {"type": "object", **part, "additionalProperties": False}, "minItems": 1}
    nothing: Schema = {"enum": [None, []]}  # as if it was left out
    message = {
        "type": "object",
        "properties": {
            "role": {"enum": list(MESSAGE_ROLES)},
            "content": {"anyOf": [fields.string.schema, parts]},
            "name": {"anyOf": [fields.string.schema, nothing]},
        },
        "required": ["role", "content"],
        "additionalProperties": nothing,
    }
    return {"type": "array", "items": message, "minItems": 1}


def _prompts(value: Any, model: ServedModel, *, max_prompts: int, limit: str) -> tuple[Prompt, ...]:
    """One or many prompts; a list of whole numbers is one prompt of token ids."""
    if isinstance(value, str):
        return (_prompt(value, model),)
    if not isinstance(value, list):
        if value is None:
            raise RequestError("prompt is missing", param="prompt")
        raise bad_value("prompt", value, "a string, a list of token ids, or a list of either")
    if not value or not isinstance(value[0], str | list):
        return (_prompt(value, model),)
    if len(value) > max_prompts:
        text = f"prompt holds {len(value)} prompts; one request may hold {max_prompts} ({limit})"
        raise RequestError(text, param="prompt")
    return tuple(_prompt(prompt, model) for prompt in value)


def _prompt(value: Any, model: ServedModel) -> Prompt:
    prompt = (
        fields.string(value, "prompt")
        if isinstance(value, str)
        else fields.token_ids(model.vocab_size)(value, "prompt")
    )
    if not prompt:
        raise RequestError("prompt is empty; it must hold at least one token", param="prompt")
    return prompt


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise bad_value("messages", value, "a list of at least one message")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(value: Any, name: str) -> dict[str, Any]:
    """A message with its content as one string; what it says with tools, images or sound is refused."""
    given = {key: entry for key, entry in fields.mapping(value, name).items() if entry not in (None, [])}
    role = given.pop("role", None)
    if role not in MESSAGE_ROLES:
        raise bad_value(f"{name}.role", role, "one of " + ", ".join(MESSAGE_ROLES))
    message = {
        "role": "system" if role == "developer" else role,
        "content": _content(given.pop("content", None), f"{name}.content"),
    }
    if "name" in given:
        message["name"] = fields.string(given.pop("name"), f"{name}.name")
    if given:
        raise RequestError(
            f"{name} has {', '.join(repr(key[:80]) for key in islice(given, 3))}: a message has role, content and name",
            param=name,
        )
    return message


def _content(value: Any, name: str) -> str:
    if isinstance(value, str):
        return fields.string(value, name)
    if not isinstance(value, list):
        raise bad_value(name, value, "a string, or a list of text parts")
    texts: list[str] = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) != {"type", "text"}:
            raise bad_value(f"{name}[{i}]", part, 'only parts like {"type": "text", "text": "..."} are supported')
        texts.append(fields.string(part["text"], f"{name}[{i}].text"))
    return "\n".join(texts)
