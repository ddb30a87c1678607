"""What a training run does to need less memory, by its configuration."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from longctx.training.activation_checkpointing import checkpoint_layers
from longctx.training.activation_store import open_store
from longctx.training.config import TrainLoopConfig
from longctx.training.tiled_mlp import tile_mlps


def save_memory(
    model: PreTrainedModel, config: TrainLoopConfig, *, device: torch.device, scratch: Path
) -> list[torch.nn.Module]:
    """Apply activation checkpointing, its offload and MLP tiles; the loss's tiles are ``LossHead``'s.

    Args:
        model: with its adapters, before it is given to DeepSpeed.
        config: what of it is wanted.
        device: the model's.
        scratch: folder for activations that a CPU offloads.

    Returns:
        Modules that must be leaves under ZeRO-3; see ``tile_mlps``.

    Raises:
        ConfigError: if this model has no part for a choice.
    """
    leaves = tile_mlps(model, tile=config.mlp_tile) if config.mlp_tile else []
    if config.activation_checkpointing:
        store = open_store(device, scratch) if config.activation_offload else None
        checkpoint_layers(model, keep_attention=config.keep_attention, store=store)
    return leaves
