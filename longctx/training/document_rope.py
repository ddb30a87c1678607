"""Rotary embeddings that depend on a document's length, of documents that are packed and lie on several ranks.

``dynamic`` and ``longrope`` scaling choose frequencies by the length. transformers takes the highest position that it
is given for it: a rank that has the beginning of a document would turn its keys otherwise than the one that has the
end, and one long document would change the short ones beside it. Here each token goes by the length of its own
document, which is what it is served with.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from longctx.models.rope import RotaryTable


class DocumentRope:
    """Takes the place of a model's rotary embedding, if that depends on lengths.

    Args:
        model: its rotary embedding's ``forward`` is replaced.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._lengths_T: torch.Tensor | None = None
        table = RotaryTable(model.config)
        if table.depends_on_length:
            decoder: Any = model.get_decoder()
            self._table = table
            decoder.rotary_emb.forward = self._forward

    def set_lengths(self, lengths: torch.Tensor) -> None:
        """``[1, num_local_tokens]``: of each token's document, in the calls that follow."""
        self._lengths_T = lengths.flatten().cpu()

    def _forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers' ``forward``: cosines and sines ``[1, num_local_tokens, D]`` in the type of ``hidden``."""
        assert self._lengths_T is not None, "a model that ranks share runs by SequenceParallel"
        self._table.reserve(int(self._lengths_T.max()))
        cos_TD, sin_TD = self._table.lookup(position_ids.flatten().cpu(), self._lengths_T)
        return cos_TD[None].to(hidden), sin_TD[None].to(hidden)
