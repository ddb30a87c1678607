"""Rotary embeddings of documents that are packed and lie on several ranks, where transformers' own would not do.

``dynamic`` and ``longrope`` scaling choose frequencies by the length. transformers takes the highest position that it
is given for it: a rank that has the beginning of a document would turn its keys otherwise than the one that has the
end, and one long document would change the short ones beside it. Here each token goes by the length of its own
document, which is what it is served with.

Attention that works on queries and keys before RoPE gets them so: the model turns nothing, and attention calls
``rotate``.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from longctx.models.rope import RotaryTable


class DocumentRope:
    """Takes the place of a model's rotary embedding, if that depends on lengths or is not to be.

    Args:
        model: its rotary embedding's ``forward`` is replaced.
        is_deferred: the model turns nothing.
    """

    def __init__(self, model: PreTrainedModel, *, is_deferred: bool = False) -> None:
        self._lengths_T: torch.Tensor | None = None
        self._turned: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # positions, cosines, sines
        self._table = RotaryTable(model.config)
        decoder: Any = model.get_decoder()
        if is_deferred:
            decoder.rotary_emb.forward = self._turn_nothing
        elif self._table.depends_on_length:
            decoder.rotary_emb.forward = self._forward

    def set_lengths(self, lengths: torch.Tensor) -> None:
        """``[1, num_local_tokens]``: of each token's document, in the calls that follow."""
        self._lengths_T = lengths.flatten().cpu()
        self._turned.clear()

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """x turned as the model would, in float32 and rounded once.

        Args:
            x: ``[n, heads, head_dim]``.
            positions: ``[n]`` or ``[n, heads]``, whole or between tokens.
            lengths: int64 ``[n]``, of their documents.
        """
        cos, sin = self._look_up(positions, lengths)
        if positions.ndim == 1:
            cos, sin = cos[:, None], sin[:, None]
        cos, sin = cos.to(x.device), sin.to(x.device)
        turned, kept = x[..., : cos.shape[-1]].to(torch.promote_types(x.dtype, torch.float32)), x[..., cos.shape[-1] :]
        first, second = turned.chunk(2, -1)
        return torch.cat([(turned * cos + torch.cat([-second, first], -1) * sin).to(x.dtype), kept], -1)

    def _look_up(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Remembered until the next sequence where every layer asks for the same."""
        for known, cos, sin in self._turned:
            if known is positions:
                return cos, sin
        cos, sin = self._table.turn(positions.detach().cpu(), lengths.cpu())
        if not positions.is_floating_point():
            self._turned.append((positions, cos, sin))
        return cos, sin

    def _turn_nothing(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = *position_ids.shape, self._table.dim
        return hidden.new_ones(shape), hidden.new_zeros(shape)

    def _forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers' ``forward``: cosines and sines ``[1, num_local_tokens, D]`` in the type of ``hidden``."""
        assert self._lengths_T is not None, "a model that ranks share runs by SequenceParallel"
        self._table.reserve(int(self._lengths_T.max()))
        cos_TD, sin_TD = self._table.lookup(position_ids.flatten().cpu(), self._lengths_T)
        return cos_TD[None].to(hidden), sin_TD[None].to(hidden)
