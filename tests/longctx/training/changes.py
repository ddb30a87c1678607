"""Configurations of training with some keys changed, for tests."""

from dataclasses import replace

from omegaconf import OmegaConf

from longctx.training.config import TrainConfig


def change(config: TrainConfig, *overrides: str) -> TrainConfig:
    """``config`` with ``group.key=value`` set; values as YAML has them."""
    for text in overrides:
        key, _, value = text.partition("=")
        group, _, name = key.partition(".")
        parsed = OmegaConf.create(f"value: {value}").value
        kind = type(getattr(getattr(config, group), name))
        parsed = kind(parsed) if kind in (float, int) else parsed
        config = replace(config, **{group: replace(getattr(config, group), **{name: parsed})})
    return config
