"""The output layer of a causal language model that returns the sum of losses instead of logits.

The loss is computed inside the output layer's own ``forward``, which the whole model's ``forward`` calls: so whatever
watches modules (DeepSpeed's ZeRO-3 gathers a module's weights when it is called, and counts calls from the root on)
sees the calls that it expects, once each.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from longctx.errors import ConfigError
from longctx.training.tiled_loss import tiled_cross_entropy

_SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # fields of models that change logits further


class LossHead:
    """Replaces the ``forward`` of a model's output layer; without targets it still returns logits.

    Args:
        model: a causal language model, before it is given to DeepSpeed; also a PEFT model.
        tile: tokens whose logits exist at one time; 0: all.

    Raises:
        ConfigError: for an output layer that is no plain linear layer, or a model that changes logits after it.
    """

    def __init__(self, model: PreTrainedModel, *, tile: int) -> None:
        head = model.get_output_embeddings()
        if type(head) is not torch.nn.Linear:
            raise ConfigError(f"an output layer of type {type(head).__name__} cannot be trained: a plain linear layer")
        for name in _SCALED:
            value = getattr(model.config, name, None)
            if value not in (None, 1.0):
                raise ConfigError(f"{name}={value} in the model's config.json is not supported in training: null or 1")
        self._tile = tile
        self._targets_N: torch.Tensor | None = None
        self._scale = 1.0
        self._head: Any = head
        self._compute_logits = head.forward
        self._head.forward = self._forward

    def loss(
        self, model: Callable[..., Any], targets: torch.Tensor, *, scale: float = 1.0, **inputs: Any
    ) -> torch.Tensor:
        """``scale`` times the sum of cross entropies of one run of ``model(**inputs)``.

        Args:
            model: the model, or what wraps it and is called alike: a PEFT model, a DeepSpeed engine.
            targets: int64, shaped as the model's tokens; -100 where one does not count. Already shifted: the target of
                a token is the one after it.
            scale: see ``tiled_cross_entropy``; 1 / number of tokens that count makes it the mean.
            inputs: of the model.

        Returns:
            A scalar in float32, differentiable.
        """
        self._targets_N, self._scale = targets.reshape(-1), scale
        try:
            return model(**inputs).logits
        finally:
            self._targets_N = None

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._targets_N is None:
            return self._compute_logits(hidden)
        return tiled_cross_entropy(
            hidden.flatten(0, -2),
            self._head.weight,
            self._targets_N,
            tile=self._tile,
            scale=self._scale,
            bias_V=self._head.bias,
        )
