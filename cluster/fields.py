"""Readers of single request fields: each returns the value it was given, or raises an error naming what is allowed.

``null`` never reaches a reader, it means that the field was left out. What a reader takes is also its JSON Schema, of
which the endpoint's description is made (``cluster/openapi.py``).
"""

import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from longctx.errors import RequestError


class _Quote(reprlib.Repr):
    """Takes no longer for a large value than for a small one."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)  # it sorts what it gets


QUOTE = _Quote()
QUOTE.maxstring = QUOTE.maxother = 80

T = TypeVar("T")

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the value of one field.

    Args:
        read: ``(value, name) -> value``; raises ``RequestError``.
        schema: what it takes, as JSON Schema.
    """

    read: Callable[[Any, str], Any]
    schema: Schema

    def __call__(self, value: Any, name: str) -> Any:
        return self.read(value, name)


def bad_value(name: str, value: Any, allowed: str) -> RequestError:
    """An error that quotes the start of ``value``."""
    return RequestError(f"{name}={QUOTE.repr(value)} is not allowed: {allowed}", param=name)


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise bad_value(name, value, "true or false")
    return value


def integer(low: int, high: int) -> Reader:
    """A reader of whole numbers from ``low`` to ``high``; JSON's ``10.0`` is not one."""

    def read(value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise bad_value(name, value, f"a whole number from {low} to {high}")
        return value

    return Reader(read, {"type": "integer", "minimum": low, "maximum": high})


def number(low: float, high: float, *, above: bool = False) -> Reader:
    """A reader of numbers from ``low`` to ``high``; with ``above``, ``low`` itself is not allowed."""

    def read(value: Any, name: str) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or (above and value == low):
            bounds = f"a number above {low:g}" if above else f"a number from {low:g}"
            raise bad_value(name, value, bounds + (f" up to {high:g}" if math.isfinite(high) else ""))
        return float(value)

    schema: Schema = {"type": "number", "exclusiveMinimum" if above else "minimum": low}
    return Reader(read, schema | ({"maximum": high} if math.isfinite(high) else {}))


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise bad_value(name, value, "a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            text = f"{name} holds half a surrogate pair at character {error.start}, which is no text"
            raise RequestError(text, param=name) from None
    return value


def choice(*allowed: Any) -> Reader:
    """A reader of one of a few values."""

    def read(value: Any, name: str) -> Any:
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise bad_value(name, value, "only " + " or ".join(repr(one) for one in allowed) + " is supported")
        return value

    return Reader(read, {"enum": list(allowed)})


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_value(name, value, "an object")
    return value


boolean = Reader(_boolean, {"type": "boolean"})
# A text that has a UTF-8 form: JSON can escape half a surrogate pair, which has none.
string = Reader(_string, {"type": "string"})
mapping = Reader(_mapping, {"type": "object"})


def options(kind: type[T], readers: dict[str, Reader]) -> Reader:
    """A reader of a JSON object with some of the keys of ``readers``; gives a ``kind`` made of them."""

    def read(value: Any, name: str) -> T:
        values: dict[str, Any] = {}
        for key, entry in mapping(value, name).items():
            if key not in readers:
                raise bad_value(name, key, "its keys are " + ", ".join(readers))
            if entry is not None:
                values[key] = readers[key](entry, f"{name}.{key}")
        return kind(**values)

    properties = {key: nullable(reader.schema) for key, reader in readers.items()}
    return Reader(read, {"type": "object", "properties": properties, "additionalProperties": False})


def strings(most: int) -> Reader:
    """A reader of one non-empty string or a list of at most ``most``; gives a tuple."""

    def read(value: Any, name: str) -> tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        if (
            not isinstance(texts, list)
            or len(texts) > most
            or not all(isinstance(text, str) and text for text in texts)
        ):
            raise bad_value(name, value, f"a non-empty string, or a list of at most {most} of them")
        return tuple(string(text, name) for text in texts)

    text: Schema = {"type": "string", "minLength": 1}
    return Reader(read, {"anyOf": [text, {"type": "array", "items": text, "maxItems": most}]})


def token_ids(vocab_size: int) -> Reader:
    """A reader of a list of ids below ``vocab_size``; gives a tuple."""

    def read(value: Any, name: str) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(type(token_id) is int for token_id in value):
            raise bad_value(name, value, "a list of token ids")
        if value and not (min(value) >= 0 and max(value) < vocab_size):
            wrong = next(token_id for token_id in value if not 0 <= token_id < vocab_size)
            raise RequestError(f"{name} holds token id {wrong}; allowed are 0 to {vocab_size - 1}", param=name)
        return tuple(value)

    return Reader(read, {"type": "array", "items": integer(0, vocab_size - 1).schema})


def logit_bias(vocab_size: int) -> Reader:
    """A reader of an object keyed by token ids; gives pairs (token id, bias)."""
    read_bias = number(-100.0, 100.0)

    def read(value: Any, name: str) -> tuple[tuple[int, float], ...]:
        pairs: list[tuple[int, float]] = []
        for key, bias in mapping(value, name).items():
            if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocab_size):
                raise bad_value(name, key, f"its keys are token ids from 0 to {vocab_size - 1}")
            pairs.append((int(key), read_bias(bias, f"{name}.{key}")))
        return tuple(pairs)

    keys: Schema = {"pattern": "^[0-9]{1,11}$"}
    return Reader(read, {"type": "object", "propertyNames": keys, "additionalProperties": read_bias.schema})


def described(reader: Reader, **schema: Any) -> Reader:
    """The same reader, of which more is known than it checks: its user checks the rest."""
    return Reader(reader.read, reader.schema | schema)


def nullable(schema: Schema) -> Schema:
    """What ``schema`` has, or null, which is the same as leaving the field out."""
    return {"anyOf": [schema, {"type": "null"}]}
