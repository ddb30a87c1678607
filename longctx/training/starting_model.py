"""The model that a run starts from: a checkpoint's weights or random ones, with RoPE stretched as configured.

RoPE scaling: ``linear`` is position interpolation (Chen et al., 2023), ``dynamic`` is NTK-aware scaling by length,
``yarn`` is Peng et al., 2023; ``model.rope_theta`` is the adjusted base frequency of Xiong et al., 2023.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from longctx.models.attention_spec import write_attention
from longctx.models.checkpoint import ModelSpec
from longctx.models.loading import build_model, read_transformers_config
from longctx.models.sharded_model import Sharder
from longctx.training.config import TrainModelConfig
from longctx.training.preflight import check_context

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_starting_model(
    spec: ModelSpec,
    config: TrainModelConfig,
    *,
    context_length: int,
    device: torch.device,
    seed: int,
    sharder: Sharder | None = None,
) -> PreTrainedModel:
    """In ``config.dtype`` on ``device``, ready to be trained; the same on every rank, or cut up by ``sharder``.

    Raises:
        CheckpointError: if weights are missing or not those of the configuration.
        ConfigError: if ``context_length`` is more than the model takes as configured.
    """
    settings = read_settings(spec, config, context_length)
    model: Any = build_model(
        spec,
        settings,
        dtype=DTYPES[config.dtype],
        device=device,
        random_weights_seed=seed if config.init == "random" else None,
        sharder=sharder,
    )
    return model.to(device).train()


def read_settings(spec: ModelSpec, config: TrainModelConfig, context_length: int) -> Any:
    """The checkpoint's transformers configuration, changed to what is trained: RoPE, and ``spec``'s attention and
    vocabulary, which may differ from the checkpoint's."""
    settings = read_transformers_config(spec)
    stretch_rope(settings, spec, config, context_length)
    settings.vocab_size = spec.vocab_size
    for key, value in write_attention(spec.attention).items():
        setattr(settings, key, value)
    return settings


def stretch_rope(settings: Any, spec: ModelSpec, config: TrainModelConfig, context_length: int) -> None:
    """Change a transformers configuration to what is trained."""
    check_context(spec, config, context_length)
    rope = dict(spec.rope_parameters)
    if config.rope_theta is not None:
        rope["rope_theta"] = config.rope_theta
    trained_length = int(rope.get("original_max_position_embeddings") or settings.max_position_embeddings)
    if config.rope_scaling == "keep":
        settings.max_position_embeddings = max(settings.max_position_embeddings, context_length)
    else:
        factor = max(1.0, float(rope.get("factor", 1.0)), context_length / trained_length)
        rope |= {"rope_type": config.rope_scaling, "factor": factor}
        if config.rope_scaling == "yarn":
            rope["original_max_position_embeddings"] = trained_length
    settings.rope_parameters = rope
