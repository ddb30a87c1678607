"""The one module that imports ``peft``: it puts LoRA's and DoRA's layers into a model.

The layers are injected into the model itself: it stays the transformers model that it was, with its configuration and
its attention interface, where ``PeftModel`` would wrap it.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig, inject_adapter_in_model
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from longctx.adapters.method import Settings

# Norms and embeddings are trained where they are (``adapter.py``); peft would train copies beside them.
_NOT_PASSED = ("modules_to_save", "ensure_weight_tying", "inference_mode", "peft_type", "task_type", "auto_mapping")


def inject(model: PreTrainedModel, settings: Settings) -> None:
    """Replace the targeted linear layers by LoRA's, whose matrices have the base's dtype and device.

    Collective if ZeRO 3 has cut ``model`` up: DoRA takes its first magnitudes from whole weights, one at a time.
    """
    known = {field.name for field in dataclasses.fields(LoraConfig)} - set(_NOT_PASSED)
    arguments = {name: value for name, value in settings.items() if name in known}
    with _declare_sharding(model):
        inject_adapter_in_model(LoraConfig(task_type="CAUSAL_LM", **arguments), model)


@contextmanager
def _declare_sharding(model: PreTrainedModel) -> Iterator[None]:
    """peft gathers the weights that it looks at if transformers has been told of ZeRO 3, for the whole process."""
    if not any(hasattr(weight, "ds_id") for weight in model.parameters()):
        yield
        return
    declaration = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # transformers keeps a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del declaration
