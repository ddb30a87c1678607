"""Tiny models with adapters whose weights are random: a trained adapter, as far as arithmetic goes."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from longctx.adapters.adapter import adapter_state, add_adapter, save_adapter
from longctx.adapters.config import PeftConfig
from tests.tiny_checkpoints import make_checkpoint

METHODS = ("lora", "dora", "series", "parallel")
FAMILIES = ("llama", "qwen3", "phi3", "gemma")  # plain; tied, with head norms; fused matrices; norms around 1
INPUT_IDS = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(5))


def load_base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_config(method: str, **options) -> PeftConfig:
    """Small, on every linear layer."""
    return PeftConfig(**{"method": method, "rank": 4, "bottleneck_size": 8, "target_modules": ["all-linear"]} | options)


def randomise(model: PreTrainedModel, seed: int = 0) -> None:
    """Move every trained parameter away from where it began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def make_adapter(folder: Path, family: str, method: str, **options) -> tuple[Path, Path, PreTrainedModel]:
    """A base's folder, an adapter's folder, and the adapted model."""
    base = make_checkpoint(folder / "base", family)
    model = add_adapter(load_base(base), make_config(method, **options))
    randomise(model)
    save_adapter(adapter_state(model), model, folder / "adapter")
    return base, folder / "adapter", model


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(INPUT_IDS, use_cache=False).logits[0]
