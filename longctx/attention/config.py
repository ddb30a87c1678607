"""What the ``attention`` group of serving and generating holds. No torch here."""

import logging
from dataclasses import dataclass, replace

from longctx.errors import ConfigError
from longctx.models.attention_spec import AttentionSpec, CCASpec
from longctx.models.checkpoint import ModelSpec
from parallel.option import option

logger = logging.getLogger(__name__)

METHODS = ("auto", "dense", "landmark", "cca")
DEFAULT_CCA = CCASpec(group_size=16, window=1024)  # of a checkpoint that was not trained with it: the paper's at 64K
CORE_OPTIONS = ("group_size", "window")
LENGTH_DEPENDENT = ("dynamic", "longrope")  # RoPE types


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Which attention method runs, and how it is used at inference."""

    name: str = option("auto", "attention method; auto: what the checkpoint was trained with", choices=METHODS)
    group_size: int | None = option(
        None, "cca: tokens that become one core; null: what the checkpoint was trained with, or 16", minimum=1
    )
    window: int | None = option(
        None, "cca: tokens that each query sees as they are; null: as in training, or 1024", minimum=1
    )


def choose_method(config: AttentionConfig, spec: ModelSpec) -> AttentionSpec | None:
    """The method that ``spec`` is served with, with the sizes that are used; None: dense.

    Raises:
        ConfigError: if the checkpoint was trained for another one, or cannot be served with it.
    """
    trained = "dense" if spec.attention is None else spec.attention.name
    name = trained if config.name == "auto" else config.name
    if "landmark" in (name, trained) and name != trained:
        raise ConfigError(
            f"attention.name={config.name} is not allowed: {spec.name} was trained with {trained} attention; auto"
        )
    if name == "landmark":
        raise ConfigError(f"{spec.name} was trained with {trained} attention, which is not served yet")
    if name == "cca":
        return _choose_cca(config, spec)
    for option_name in CORE_OPTIONS:
        value = getattr(config, option_name)
        if value is not None:
            raise ConfigError(f"attention.{option_name}={value} is not allowed with {name} attention: it is for cca")
    return None


def choose_sizes(spec: CCASpec, group_size: int | None, window: int | None) -> tuple[int, int]:
    """Group size and window, those of ``spec`` where None; raises ``ValueError`` if they do not go together."""
    group_size, window = group_size or spec.group_size, window or spec.window
    if window < group_size:
        raise ValueError(
            f"attention.window={window} is not allowed with attention.group_size={group_size}: a window holds at "
            "least one group"
        )
    return group_size, window


def warn_untrained(method: AttentionSpec | None, spec: ModelSpec) -> None:
    """Say in the log if a checkpoint is served with another method than it was trained with."""
    used, trained = (("dense" if one is None else one.name) for one in (method, spec.attention))
    if used != trained:
        logger.warning("%s was trained with %s attention and is served with %s", spec.name, trained, used)


def _choose_cca(config: AttentionConfig, spec: ModelSpec) -> CCASpec:
    trained = spec.attention if isinstance(spec.attention, CCASpec) else DEFAULT_CCA
    if any(window is not None for window in spec.sliding_windows):
        raise ConfigError(f"attention.name=cca is not allowed: {spec.name} has sliding windows; dense")
    if spec.rope_type in LENGTH_DEPENDENT:
        raise ConfigError(
            f"attention.name=cca is not allowed: {spec.name} has RoPE of type {spec.rope_type}, whose angles depend on "
            "a sequence's length; dense"
        )
    try:
        group_size, window = choose_sizes(trained, config.group_size, config.window)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return replace(trained, group_size=group_size, window=window)
