"""One field of a configuration dataclass: its default, its comment and what values it takes.

The command line shows the comments (``longctx serve --help``); ``check`` turns a bad value into an error that names the
key, the value and what is allowed. No torch here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any


def option(
    default: Any,
    comment: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    parse: Callable[[Any], Any] | None = None,
    secret: bool = False,
) -> Any:
    """A dataclass field with a default and a one-line comment.

    Args:
        default: the value without an override; a list or dictionary is copied for each object.
        comment: what the key means, with its unit.
        minimum, maximum: inclusive bounds.
        above: exclusive lower bound.
        choices: the only strings allowed.
        parse: called with the value to check it further; raises ``ValueError`` saying what is allowed.
        secret: the object's ``repr`` leaves it out.
    """
    metadata = {
        "comment": comment,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "choices": choices,
        "parse": parse,
    }
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata, repr=not secret)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def check(config: Any, prefix: str = "") -> None:
    """Raise ``ValueError`` for the first field of ``config`` whose value is not allowed; ``prefix`` is the group."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        problem = _problem(value, field.metadata)
        if problem:
            raise ValueError(f"{prefix}{field.name}={value!r} is not allowed: {problem}")


def allowed(metadata: Any) -> str:
    """What the field takes, in words; empty if anything of its type."""
    if metadata.get("choices"):
        return "one of " + ", ".join(metadata["choices"])
    bounds = [
        f"{word} {metadata[name]:g}"
        for name, word in (("minimum", "at least"), ("above", "above"), ("maximum", "at most"))
        if metadata.get(name) is not None
    ]
    return " and ".join(bounds)


def parse_size(value: str | int) -> int:
    """Bytes of ``"512MiB"``, ``"4GiB"``, ``"2GB"`` or a plain number."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    text = str(value).strip().lower()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(number) :].strip()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise ValueError("a number of bytes, or a number with KiB, MiB, GiB, KB, MB or GB") from None
    if size < 0:
        raise ValueError("a size of at least 0")
    return size


def parse_budget(value: str | int) -> int | None:
    """Bytes, or None for ``"auto"``; raises ``ValueError`` saying what is allowed."""
    return None if value == "auto" else parse_size(value)


def _problem(value: Any, metadata: Any) -> str:
    if value is None or "comment" not in metadata:
        return ""
    if metadata["choices"] and value not in metadata["choices"]:
        return allowed(metadata)
    low, high, above = metadata["minimum"], metadata["maximum"], metadata["above"]
    number = isinstance(value, int | float)
    if number and not (
        (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
    ):
        return allowed(metadata)
    if metadata["parse"]:
        try:
            metadata["parse"](value)
        except ValueError as error:
            return str(error)
    return ""
