"""The one module that imports ``peft``: it puts LoRA's and DoRA's layers into a model.

The layers are injected into the model itself: it stays the transformers model that it was, with its configuration and
its attention interface, where ``PeftModel`` would wrap it.
"""

import dataclasses

from peft import LoraConfig, inject_adapter_in_model
from transformers import PreTrainedModel

from longctx.adapters.method import Settings

# Norms and embeddings are trained where they are (``adapter.py``); peft would train copies beside them.
_NOT_PASSED = ("modules_to_save", "ensure_weight_tying", "inference_mode", "peft_type", "task_type", "auto_mapping")


def inject(model: PreTrainedModel, settings: Settings) -> None:
    """Replace the targeted linear layers by LoRA's, whose matrices have the base's dtype and device."""
    known = {field.name for field in dataclasses.fields(LoraConfig)} - set(_NOT_PASSED)
    arguments = {name: value for name, value in settings.items() if name in known}
    inject_adapter_in_model(LoraConfig(task_type="CAUSAL_LM", **arguments), model)
