"""Decoder layers that keep their input only, and are computed again in the backward.

Layers are wrapped here rather than by transformers' switch, so that a layer can keep its attention's result besides
(``parallel/kept_attention.py``): what is computed again then talks to no other rank. Without that, ranks run the
exchange of each layer again, all in the order of the backward, which is the same on all of them. Inputs need no
gradient for it: frozen embeddings below adapters stay as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from longctx.training.activation_store import ActivationStore
from parallel.kept_attention import KeptAttention


def checkpoint_layers(
    model: PreTrainedModel, *, keep_attention: bool = True, store: ActivationStore | None = None
) -> None:
    """Replace the ``forward`` of every decoder layer; without gradients it does what it did.

    Args:
        model: its layers take hidden states as their one positional argument, as transformers' decoders do.
        keep_attention: attention's output is kept, too, one more tensor of the hidden size a layer.
        store: where both wait; None: where they are.
    """
    decoder: Any = model.get_decoder()
    for layer in decoder.layers:
        layer.forward = _Checkpointed(layer.forward, keep_attention, store).forward


class _Checkpointed:
    """One layer's own ``forward`` and what it keeps."""

    def __init__(self, compute: Callable[..., Any], keep_attention: bool, store: ActivationStore | None) -> None:
        self._compute, self._keep_attention, self._store = compute, keep_attention, store

    def forward(self, hidden: torch.Tensor, **inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._compute(hidden, **inputs)
        arguments: dict[str, Any] = {"use_reentrant": False}
        if self._keep_attention:
            arguments["context_fn"] = self._make_phases
        if self._store is None:
            return checkpoint(self._compute, hidden, **arguments, **inputs)
        # What the layer itself would save is dropped by checkpoint's own hooks: these see its input only.
        with saved_tensors_hooks(self._store.pack, self._store.unpack):
            return checkpoint(self._compute, hidden, **arguments, **inputs)

    def _make_phases(self) -> tuple[Any, Any]:
        hooks = (None, None) if self._store is None else (self._store.pack, self._store.unpack)
        kept = KeptAttention(*hooks)
        return kept.recording(), kept.replaying()
