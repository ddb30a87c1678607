"""Bottleneck adapters as modules on the sublayers of a transformers decoder (``bottleneck.py`` has the formulas).

A sublayer keeps its class and its parameters' names: the adapter is its child ``adapter``, and a forward hook adds what
it computes. So activation checkpointing, ZeRO and tiled MLPs see a model as they know it, with one module more.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from longctx.adapters.method import Settings

Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATION_FUNCTIONS: dict[str, Activation] = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class Bottleneck(nn.Module):
    """``[..., C]`` to ``[..., C]``: down, activation, up.

    Args:
        hidden_size: C.
        settings: adapter_config.json.
        reads_input: whether it is given its sublayer's input, or the output.
        like: a weight of the base, whose dtype and device the matrices take.
    """

    def __init__(self, hidden_size: int, settings: Settings, *, reads_input: bool, like: torch.Tensor) -> None:
        super().__init__()
        size, place = settings["bottleneck_size"], {"dtype": like.dtype, "device": like.device}
        self.reads_input = reads_input
        self.activation = ACTIVATION_FUNCTIONS[settings["activation"]]
        self.dropout = nn.Dropout(settings.get("dropout", 0.0))
        self.down = nn.Linear(hidden_size, size, bias=False, **place)
        self.up = nn.Linear(size, hidden_size, bias=False, **place)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the sublayer's output."""
        return self.up(self.activation(self.down(self.dropout(x))))


def attach_bottlenecks(model: PreTrainedModel, settings: Settings, *, reads_input: bool) -> None:
    """Give every targeted sublayer an adapter."""
    decoder: Any = model.get_decoder()
    like = decoder.embed_tokens.weight
    for layer in decoder.layers:
        for target in settings["target_modules"]:
            sublayer = getattr(layer, target)
            sublayer.adapter = Bottleneck(model.config.hidden_size, settings, reads_input=reads_input, like=like)
            sublayer.register_forward_hook(_add_adapter, with_kwargs=True)


def _add_adapter(sublayer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook; attention returns its output first in a tuple."""
    out = output[0] if isinstance(output, tuple) else output
    adapter: Any = sublayer.adapter
    given = args[0] if args else kwargs["hidden_states"]
    out = out + adapter(given if adapter.reads_input else out)
    return (out, *output[1:]) if isinstance(output, tuple) else out
