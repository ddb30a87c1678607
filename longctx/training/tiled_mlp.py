"""Decoder layers whose MLP works on a tile of tokens at a time, forward and backward.

An MLP's inner activations are several times as wide as what it is given. They exist for one tile: the backward computes
them again tile by tile. Gradients of weights are added up over tiles in float32 and reach a weight once a backward, so
whatever hooks them (DeepSpeed reduces a gradient as soon as it is there) sees nothing unusual.
(DeepSpeed's ALST, arXiv 2506.13996, calls this TiledMLP.)
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from longctx.errors import ConfigError
from longctx.training.random_state import RandomState


def tile_mlps(model: PreTrainedModel, *, tile: int) -> list[torch.nn.Module]:
    """Replace the ``forward`` of every decoder layer's MLP.

    Args:
        model: its MLPs work on each token alone and keep the shape.
        tile: tokens that exist inside an MLP at one time, at least 1.

    Returns:
        The MLPs. Under ZeRO-3 each must be made a leaf (``deepspeed.utils.set_z3_leaf_module``), whose weights are
        gathered together: ranks may have different numbers of tiles, so none may gather within one.

    Raises:
        ConfigError: for a model whose layers have no ``mlp``.
    """
    decoder: Any = model.get_decoder()
    mlps: list[torch.nn.Module] = []
    for index, layer in enumerate(decoder.layers):
        if not hasattr(layer, "mlp"):
            raise ConfigError(f"train.mlp_tile={tile} is not allowed: layer {index} of this model has no mlp; 0")
        mlps.append(layer.mlp)
    for mlp in mlps:
        mlp.forward = _Tiled(mlp, tile).forward
    return mlps


class _Tiled:
    """One MLP and its own ``forward``."""

    def __init__(self, mlp: torch.nn.Module, tile: int) -> None:
        self._mlp, self._tile = mlp, tile
        self.compute: Callable[[torch.Tensor], torch.Tensor] = mlp.forward

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """What is trained in the MLP, adapters included."""
        return [weight for weight in self._mlp.parameters() if weight.requires_grad]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # The node comes first and keeps the input, then the output is computed into it: a checkpointed layer that is
        # computed again stops at the last tensor that a node keeps, so it does not compute the MLP for nothing.
        out = _TiledMlp.apply(hidden, self, *self.weights)
        with torch.no_grad():
            for target, source in zip(self.split(out.detach()), self.split(hidden.detach()), strict=True):
                target.copy_(self.compute(source))
        return out

    def split(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tiles of tokens; views if ``hidden`` is contiguous."""
        return hidden.reshape(1, -1, hidden.shape[-1]).split(self._tile, 1)


class _TiledMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, tiled: _Tiled, *weights: torch.nn.Parameter) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.tiled, ctx.num_weights, ctx.random_state = tiled, len(weights), RandomState(hidden.device)
        return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] as the decorator has no types
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        tiled, is_needed = ctx.tiled, ctx.needs_input_grad[0]
        weights = tiled.weights
        assert len(weights) == ctx.num_weights, "requires_grad was changed between forward and backward"
        dhidden = torch.empty_like(grad_outputs[0], memory_format=torch.contiguous_format)
        sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
        tiles = zip(*(tiled.split(whole) for whole in (hidden, grad_outputs[0], dhidden)), strict=True)
        with ctx.random_state.restored():
            for source, dout, target in tiles:
                source = source.detach().requires_grad_(is_needed)
                with torch.enable_grad():
                    out = tiled.compute(source)
                wanted = [source, *weights] if is_needed else weights
                grads = torch.autograd.grad(out, wanted, dout, materialize_grads=True)
                if is_needed:
                    target.copy_(grads[0])
                for total, grad in zip(sums, grads[is_needed:], strict=True):
                    total += grad
        return (
            dhidden if is_needed else None,
            None,
            *(total.to(weight.dtype) for total, weight in zip(sums, weights, strict=True)),
        )
