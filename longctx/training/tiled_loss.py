"""Cross entropy over the vocabulary, whose logits exist for a tile of tokens at a time.

Softmax and loss of a tile are known before the next tile begins, and so are its gradients: they are computed in the
forward, which is the last thing that a forward does. Computing logits again in the backward
instead would take a third more time and no less memory at the peak: the weight's gradient has to be there either way.
(As Liger Kernel's fused linear cross entropy, arXiv 2410.10989, and DeepSpeed's ALST, arXiv 2506.13996, do.) Tokens
that do not count cost nothing.

Legend: N tokens, C hidden size, V vocabulary, T tokens of a tile.
"""

from typing import Any

import torch

IGNORED = -100  # a target that does not count, as in transformers


def tiled_cross_entropy(
    hidden_NC: torch.Tensor,
    weight_VC: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    tile: int,
    scale: float = 1.0,
    bias_V: torch.Tensor | None = None,
) -> torch.Tensor:
    """``scale`` times the sum of the cross entropies of ``softmax(hidden @ weight.T + bias)``, differentiable once.

    Args:
        hidden_NC: ``[num_tokens, hidden_size]``, any floating dtype.
        weight_VC: ``[vocab_size, hidden_size]``, the same dtype. Its gradient is computed only if it needs one.
        targets_N: int64 ``[num_tokens]``, ``IGNORED`` where a token does not count.
        tile: tokens whose logits exist at one time; 0: all.
        scale: of the loss. In half precision gradients are more exact if the loss is not scaled after this call: they
            are rounded here.
        bias_V: ``[vocab_size]``.

    Returns:
        A scalar, float32 (float64 for float64 inputs): 0 if no token counts. Matrices are multiplied in the inputs'
        dtype; softmax, the sum and the weight's gradient are in the scalar's.

    Raises:
        ValueError: for shapes or dtypes that do not go together.
    """
    shapes = f"hidden {tuple(hidden_NC.shape)}, weight {tuple(weight_VC.shape)}, targets {tuple(targets_N.shape)}"
    if hidden_NC.ndim != 2 or weight_VC.shape[1:] != hidden_NC.shape[1:] or targets_N.shape != hidden_NC.shape[:1]:
        raise ValueError(f"{shapes} are not allowed: [N, C], [V, C], [N]")
    if weight_VC.dtype != hidden_NC.dtype:
        raise ValueError(f"hidden {hidden_NC.dtype} and weight {weight_VC.dtype} are not allowed: one dtype")
    if tile < 0 or scale <= 0:
        raise ValueError(f"tile={tile} and scale={scale} are not allowed: at least 0, above 0")
    tile = tile or max(1, len(targets_N))
    return _TiledCrossEntropy.apply(hidden_NC, weight_VC, bias_V, targets_N, tile, scale, torch.is_grad_enabled())


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: torch.Tensor,
        weight_VC: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        tile: int,
        scale: float,
        has_backward: bool,
    ) -> torch.Tensor:
        dtype = torch.promote_types(hidden_NC.dtype, torch.float32)
        inputs = (hidden_NC, weight_VC, bias_V)
        # Gradients of what needs one; the hidden states' is in their dtype, as it is not added to.
        dtypes = (hidden_NC.dtype, dtype, dtype)
        grads = [
            torch.zeros_like(tensor, dtype=grad_dtype) if tensor is not None and is_needed and has_backward else None
            for tensor, grad_dtype, is_needed in zip(inputs, dtypes, ctx.needs_input_grad, strict=False)
        ]
        total = torch.zeros((), dtype=dtype, device=hidden_NC.device)
        counted = (targets_N != IGNORED).nonzero()[:, 0]
        for rows_T in counted.split(tile):
            total += _add_tile_(hidden_NC[rows_T], weight_VC, bias_V, targets_N[rows_T], rows_T, scale, grads)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        return total * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] as the decorator has no types
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        scaled = (
            None if grad is None else torch.mul(grad, grad_outputs[0], out=torch.empty_like(grad, dtype=dtype))
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None


def _add_tile_(
    hidden_TC: torch.Tensor,
    weight_VC: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_T: torch.Tensor,
    rows_T: torch.Tensor,
    scale: float,
    grads: list[torch.Tensor | None],
) -> torch.Tensor:
    """The tile's loss, not scaled; its part of the scaled gradients is added to ``grads`` (hidden, weight, bias)."""
    dhidden_NC, dweight_VC, dbias_V = grads
    logits_TV = torch.nn.functional.linear(hidden_TC, weight_VC, bias_V)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    logits_TV -= logits_TV.amax(1, keepdim=True)
    picked_T = logits_TV.gather(1, targets_T[:, None])[:, 0]
    sums_T = logits_TV.exp_().sum(1)
    loss = (sums_T.log() - picked_T).sum()
    if all(grad is None for grad in grads):
        return loss
    dlogits_TV = logits_TV.div_(sums_T[:, None] / scale)
    dlogits_TV[torch.arange(len(rows_T), device=rows_T.device), targets_T] -= scale
    if dbias_V is not None:
        dbias_V += dlogits_TV.sum(0)
    dlogits_TV = dlogits_TV.to(hidden_TC.dtype)
    if dhidden_NC is not None:
        dhidden_NC[rows_T] = dlogits_TV @ weight_VC
    if dweight_VC is not None and dweight_VC.dtype == hidden_TC.dtype:
        dweight_VC.addmm_(dlogits_TV.T, hidden_TC)
    elif dweight_VC is not None:
        dweight_VC += dlogits_TV.T @ hidden_TC
    return loss
