"""Merges LoRA and DoRA into the weights they adapt.

LoRA (arXiv 2106.09685, section 4.1): W' = W + s B A. DoRA (arXiv 2402.09353, equation 5): the rows of that, each at its
trained length. Computed in float32 and rounded once. Without ``peft``: a server starts without its imports.
"""

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from longctx.adapters.folder import PREFIX, TENSOR_FILE, AdapterFolder
from longctx.adapters.low_rank import read_scale


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, adapter: AdapterFolder) -> None:
    """Change the weights of ``model``, in place, to what they are with a LoRA or DoRA adapter.

    Args:
        model: the adapter's base, as loaded.
        adapter: from ``inspect_adapter``, for this model.
    """
    tensors = load_file(adapter.path / TENSOR_FILE)
    for name in adapter.tensors:
        module_name, _, kind = name.removeprefix(PREFIX).partition(".lora_A")
        if kind:
            prefix = f"{PREFIX}{module_name}."
            down, up = tensors[f"{prefix}lora_A.weight"].float(), tensors[f"{prefix}lora_B.weight"].float()
            weight = model.get_parameter(f"{module_name}.weight")
            scale = read_scale(adapter.settings, module_name, down.shape[0])
            merged = weight.float() + (scale * (up @ down)).to(weight.device)
            magnitude = tensors.get(f"{prefix}lora_magnitude_vector")
            if magnitude is not None:
                merged *= (magnitude.float().to(weight.device) / merged.norm(dim=1))[:, None]
            weight.copy_(merged)
    for name in adapter.whole_tensors:
        model.get_parameter(name).copy_(tensors[PREFIX + name])
