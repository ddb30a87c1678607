"""What the ``attention`` group of serving and generating holds. No torch here."""

from dataclasses import dataclass

from longctx.errors import ConfigError
from longctx.models.attention_spec import AttentionSpec
from longctx.models.checkpoint import ModelSpec
from parallel.option import option

METHODS = ("auto", "dense", "landmark", "cca")


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Which attention method runs, and how it is used at inference."""

    name: str = option("auto", "attention method; auto: what the checkpoint was trained with", choices=METHODS)


def choose_method(config: AttentionConfig, spec: ModelSpec) -> AttentionSpec | None:
    """The method that ``spec`` is served with; None: dense.

    Raises:
        ConfigError: if the checkpoint was trained for another one.
    """
    trained = "dense" if spec.attention is None else spec.attention.name
    if config.name not in ("auto", trained):
        raise ConfigError(
            f"attention.name={config.name} is not allowed: {spec.name} was trained with {trained} attention; auto"
        )
    if spec.attention is not None:
        raise ConfigError(f"{spec.name} was trained with {trained} attention, which is not served yet")
    return spec.attention
