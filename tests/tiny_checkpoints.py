"""Tiny random Hugging Face checkpoints, made on the spot by tests.

Every family longctx serves has one: two layers, hidden size 64, heads of 16, a byte-level tokenizer of 260 tokens with
the demo model's chat template. Weights are scaled up until different prompts continue differently; the defaults of
transformers would repeat one token.
"""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longctx.models.train_demo import make_tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma")
VOCAB_SIZE = 260
WEIGHT_SCALE = 2.0  # of matrices, times 1 / sqrt(in_features)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 259,
    "tie_word_embeddings": False,
}
_FAMILY_SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": 48},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "phi3": {},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True},
}


def make_checkpoint(
    folder: Path,
    family: str,
    *,
    dtype: str = "float32",
    seed: int = 0,
    chat_template: bool = True,
    max_shard_size: str = "5GB",
    tokenizer: bool = True,
    **config_overrides: Any,
) -> Path:
    """Write a checkpoint of ``family`` into ``folder`` and return the folder.

    Args:
        folder: made if missing.
        family: one of ``FAMILIES``.
        dtype: element type of the stored weights.
        seed: of the weights.
        chat_template: False leaves the chat template out of the tokenizer.
        max_shard_size: as ``save_pretrained`` takes it; a small one gives several safetensors files and an index.
        tokenizer: False writes no tokenizer files.
        config_overrides: fields of the family's Hugging Face configuration.
    """
    config = AutoConfig.for_model(family, **(_SHAPE | _FAMILY_SHAPES[family] | config_overrides))
    # A generator of its own: making a checkpoint does not disturb the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise(model)
    model.generation_config.eos_token_id = config.eos_token_id
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        _save_tokenizer(folder, chat_template=chat_template)
    return folder


def _save_tokenizer(folder: Path, *, chat_template: bool) -> None:
    tokenizer = make_tokenizer()
    if not chat_template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder, save_jinja_files=False)


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Normal matrices, biases and norm weights, so that forgetting any one of them changes the output.

    A tied embedding is made small, and the final norm large in return: the last token would else predict itself.
    """
    config = model.config
    embedding_std = 0.7 if not config.tie_word_embeddings else 0.025 if config.model_type == "gemma" else 0.2
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = embedding_std if "embed" in name else WEIGHT_SCALE / math.sqrt(parameter.shape[1])
            parameter.normal_(0.0, std)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    if config.tie_word_embeddings:
        model.get_parameter("model.norm.weight").add_(0.25 / embedding_std)
