"""Which attention a checkpoint was trained with, as its config.json says. No torch here.

Ours is one key, ``longctx_attention``, that transformers keeps and passes on: ``{"name": "landmark", "block_size": 63,
"landmark_token_id": 703}`` or ``{"name": "cca", "group_size": 16, "window": 1024, "core_position": "last",
"head_pooling": "weights"}``. Without it a checkpoint is dense. ``docs/landmark_and_cca.md`` says what they do.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from longctx.errors import CheckpointError

KEY = "longctx_attention"
CORE_POSITIONS = ("last", "middle", "mean")
HEAD_POOLING = ("weights", "query")


@dataclasses.dataclass(frozen=True, slots=True)
class LandmarkSpec:
    """Landmark attention: behind every ``block_size`` tokens of a document stands a landmark token."""

    name: ClassVar[str] = "landmark"
    block_size: int  # tokens of a block, without its landmark
    landmark_token_id: int  # a row of the embedding that no text is tokenised into


@dataclasses.dataclass(frozen=True, slots=True)
class CCASpec:
    """CCA attention; see ``longctx.cca_attention``. Both sizes may be others at inference."""

    name: ClassVar[str] = "cca"
    group_size: int  # tokens of a core
    window: int  # tokens that every query sees as they are, itself included
    core_position: str = "last"
    head_pooling: str = "weights"


AttentionSpec = LandmarkSpec | CCASpec
_SPECS: dict[str, type[AttentionSpec]] = {spec.name: spec for spec in (LandmarkSpec, CCASpec)}
_CHOICES = {"core_position": CORE_POSITIONS, "head_pooling": HEAD_POOLING}
_LOWEST = {"landmark_token_id": 0}  # of numbers; others are at least 1


def read_attention(folder: Path, config: dict[str, Any]) -> AttentionSpec | None:
    """What config.json says of its attention; None: dense.

    Args:
        folder: for error messages.
        config: config.json.

    Raises:
        CheckpointError: for an entry that is not whole, or not understood.
    """
    entry = config.get(KEY)
    if entry is None:
        return None
    kind = _SPECS.get(str(entry.get("name"))) if isinstance(entry, dict) else None
    if kind is None:
        raise CheckpointError(f"{folder}: {KEY}={entry!r} is not supported; its name is one of {', '.join(_SPECS)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {key: value for key, value in entry.items() if key != "name"}
    unknown = [key for key in values if key not in fields]
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    if unknown or missing:
        raise CheckpointError(
            f"{folder}: {KEY} of {kind.name} has {', '.join(values) or 'no keys'}; its keys are {', '.join(fields)}"
        )
    for key, value in values.items():
        _check_value(folder, key, value)
    spec = kind(**values)
    if isinstance(spec, LandmarkSpec) and spec.landmark_token_id >= config["vocab_size"]:
        raise CheckpointError(
            f"{folder}: {KEY}: landmark_token_id={spec.landmark_token_id} is not allowed: below vocab_size, "
            f"{config['vocab_size']}"
        )
    return spec


def write_attention(spec: AttentionSpec | None) -> dict[str, Any]:
    """What config.json says of it: to be merged into the rest."""
    return {} if spec is None else {KEY: {"name": spec.name} | dataclasses.asdict(spec)}


def _check_value(folder: Path, key: str, value: Any) -> None:
    choices = _CHOICES.get(key)
    if choices is not None:
        if value not in choices:
            raise CheckpointError(f"{folder}: {KEY}: {key}={value!r} is not allowed: {', '.join(choices)}")
        return
    lowest = _LOWEST.get(key, 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise CheckpointError(f"{folder}: {KEY}: {key}={value!r} is not allowed: a whole number, at least {lowest}")
