"""What LoRA and DoRA share: PEFT's own adapter_config.json and tensor names. No torch here."""

import math
import re
from typing import TYPE_CHECKING, Any

from longctx.adapters.config import PeftConfig
from longctx.adapters.method import ANY, AdapterMethod, Settings, Shapes, choose_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What changes the base, or the product, in ways that neither merging nor the tensors' names would show.
_UNSUPPORTED = (
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
)
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the base's weights


class LowRankMethod(AdapterMethod):
    """``W + scale * B A``, through ``peft``; subclasses say whether magnitudes are trained apart."""

    peft_type = "LORA"
    is_merged = True
    use_dora: bool

    def owns(self, settings: Settings) -> bool:
        return super().owns(settings) and bool(settings.get("use_dora")) == self.use_dora

    def describe(self, config: PeftConfig, shapes: Shapes) -> Settings:
        return {
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "target_modules": choose_targets(config.target_modules, shapes),
            "use_dora": self.use_dora,
            "use_rslora": False,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }

    def refuse(self, settings: Settings) -> str | None:
        for name in _UNSUPPORTED:
            if settings.get(name):
                return f"{name}={settings[name]!r} is not supported"
        if settings.get("bias", "none") != "none":
            return f"bias={settings['bias']!r} is not supported; allowed: none"
        if settings.get("init_lora_weights", True) not in _HARMLESS_INITS:
            return (
                f"init_lora_weights={settings['init_lora_weights']!r} is not supported: it changes the base's weights"
            )
        return None

    def expected_shape(self, name: str, shapes: Shapes) -> tuple[int, ...] | None:
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        shape = shapes.get(f"{module}.weight", ())
        if len(shape) != 2 or "embed" in module:
            return None
        wanted = {"lora_A": (ANY, shape[1]), "lora_B": (shape[0], ANY), "lora_magnitude_vector": (shape[0],)}
        return wanted[kind] if kind in self.kinds else None

    def attach(self, model: "PreTrainedModel", settings: Settings) -> None:
        from longctx.adapters.peft_layers import inject  # seconds of imports: only training needs them

        inject(model, settings)

    def file_name(self, parameter_name: str) -> str:
        name = parameter_name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
        return name.replace(".default.", ".").replace(".base_layer.", ".")


def read_scale(settings: Settings, module_name: str, rank: int) -> float:
    """What B A is multiplied by, as PEFT has it."""
    patterns: dict[str, Any] = settings.get("alpha_pattern") or {}
    key = next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module_name)), None)
    alpha = float(settings.get("lora_alpha", 8) if key is None else patterns[key])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
