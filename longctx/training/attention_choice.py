"""Which attention a run trains: what is configured, what the checkpoint was trained with, and whether they go together.

A model may change from dense attention to any other, and CCA's sizes may change. What was trained with landmarks is not
trained otherwise: its landmark tokens mean nothing to another attention or another block size. No torch here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from longctx.adapters.config import PeftConfig
from longctx.errors import ConfigError
from longctx.models.attention_spec import AttentionSpec, CCASpec, LandmarkSpec
from longctx.models.checkpoint import ModelSpec
from longctx.training.config import SF_GROUP_SIZE, TrainAttentionConfig

# What each attention takes where neither the configuration nor the checkpoint says otherwise.
DEFAULTS: Mapping[str, dict[str, Any]] = {
    "dense": {},
    "sf": {"group_size": SF_GROUP_SIZE},
    "landmark": {"block_size": 63},
    "cca": {"group_size": 16, "window": 1024, "core_position": "last", "head_pooling": "weights"},
}
_SIZES = tuple(dict.fromkeys(key for values in DEFAULTS.values() for key in values))
_MAY_BECOME = {"dense": tuple(DEFAULTS), "landmark": ("landmark",), "cca": ("cca",)}


def settle_attention(
    config: TrainAttentionConfig, spec: ModelSpec, *, context_length: int, peft: PeftConfig
) -> TrainAttentionConfig:
    """The configuration with a name and sizes in place of ``auto`` and null.

    Args:
        config: as it was given.
        spec: the checkpoint; its ``attention`` is what it, or the adapter to go on from, was trained with.
        context_length: tokens of a sequence.
        peft: of the run.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    trained = "dense" if spec.attention is None else spec.attention.name
    name = trained if config.name == "auto" else config.name
    if name not in _MAY_BECOME[trained]:
        raise ConfigError(
            f"attention.name={name} is not allowed: {spec.name} was trained with {trained} attention; "
            f"{', '.join(_MAY_BECOME[trained])} or auto"
        )
    for key in _SIZES:
        value = getattr(config, key)
        if value is not None and key not in DEFAULTS[name]:
            owners = " or ".join(owner for owner, values in DEFAULTS.items() if key in values)
            raise ConfigError(f"attention.{key}={value} is not allowed with attention.name={name}: it is {owners}'s")
    stored = {} if spec.attention is None or name != trained else dataclasses.asdict(spec.attention)
    values = {
        key: stored.get(key, default) if getattr(config, key) is None else getattr(config, key)
        for key, default in DEFAULTS[name].items()
    }
    settled = dataclasses.replace(config, name=name, **values)
    windows = [window for window in spec.sliding_windows if window is not None]
    if name != "dense" and windows:
        raise ConfigError(
            f"attention.name={name} is not allowed: {spec.name} has sliding windows of {max(windows)} tokens; dense"
        )
    if name in _CHECKS:
        _CHECKS[name](settled, spec, context_length, peft)
    return settled


def check_sf(config: TrainAttentionConfig) -> None:
    """Raise ``ConfigError`` if sinks would fill the groups of shifted sparse attention."""
    highest = (config.group_size or SF_GROUP_SIZE) // 2
    if config.sink_tokens > highest:
        raise ConfigError(
            f"attention.sink_tokens={config.sink_tokens} is not allowed: at most half of attention.group_size, "
            f"{highest}"
        )


def describe_attention(config: TrainAttentionConfig, landmark_token_id: int | None) -> AttentionSpec | None:
    """What config.json says of a model that was trained with ``config``, which is settled; None: dense, as ``sf``
    is at inference."""
    values = {key: getattr(config, key) for key in DEFAULTS[config.name]}
    if config.name == "landmark":
        assert landmark_token_id is not None
        return LandmarkSpec(**values, landmark_token_id=landmark_token_id)
    return CCASpec(**values) if config.name == "cca" else None


def place_landmark_token(spec: ModelSpec, *, has_token: Callable[[int], bool]) -> tuple[int, int]:
    """The landmark token's id and the rows of the embedding with it: the last row if no text has its token, else one
    row more. ``has_token``: whether the tokenizer knows an id."""
    if isinstance(spec.attention, LandmarkSpec):
        return spec.attention.landmark_token_id, spec.vocab_size
    last = spec.vocab_size - 1
    return (spec.vocab_size, spec.vocab_size + 1) if has_token(last) else (last, spec.vocab_size)


def _check_landmark(config: TrainAttentionConfig, spec: ModelSpec, context_length: int, peft: PeftConfig) -> None:
    assert config.block_size is not None
    trained = spec.attention
    if isinstance(trained, LandmarkSpec) and trained.block_size != config.block_size:
        raise ConfigError(
            f"attention.block_size={config.block_size} is not allowed: {spec.name} was trained with blocks of "
            f"{trained.block_size} tokens, which its landmarks stand for; null"
        )
    if trained is None and (peft.method != "none" or peft.path is not None):
        raise ConfigError(
            "attention.name=landmark with an adapter (peft) is not allowed: the landmark token is new to "
            f"{spec.name}, and its embedding would not be trained; peft=none, or a model that has landmarks"
        )
    if config.block_size > context_length - 2:
        raise ConfigError(
            f"attention.block_size={config.block_size} is not allowed with train.context_length={context_length}: "
            f"at most {context_length - 2}, so that a token sees a landmark"
            if context_length > 2
            else f"train.context_length={context_length} is not allowed with attention.name=landmark: at least 3"
        )


def _check_cca(config: TrainAttentionConfig, _: ModelSpec, context_length: int, __: PeftConfig) -> None:
    assert config.group_size is not None and config.window is not None
    if config.group_size > config.window:
        raise ConfigError(
            f"attention.group_size={config.group_size} is not allowed with attention.window={config.window}: a group "
            "is at most as long as the window"
        )
    if config.window + config.group_size > context_length:
        raise ConfigError(
            f"attention.window={config.window} with attention.group_size={config.group_size} is not allowed with "
            f"train.context_length={context_length}: together at most that, or no query sees a core"
        )


_CHECKS: dict[str, Callable[[TrainAttentionConfig, ModelSpec, int, PeftConfig], None]] = {
    "sf": lambda config, *_: check_sf(config),
    "landmark": _check_landmark,
    "cca": _check_cca,
}
