"""The learning rate of each step; WSD is warm-up, stable, decay (Hu et al., MiniCPM, 2024, section 4)."""

import math

from longctx.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Of optimizer step ``step``, the first being 0, of ``num_steps``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    rest = max(1, num_steps - config.warmup_steps)
    share = min(1.0, (step - config.warmup_steps) / rest)  # of the steps behind the warm-up that are done
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * _height(config, share))


def _height(config: OptimizerConfig, share: float) -> float:
    """From 1 at the top to 0 at the end."""
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    if config.schedule == "linear":
        return 1 - share
    if config.schedule == "wsd" and config.decay_share:
        return min(1.0, (1 - share) / config.decay_share)
    return 1.0
