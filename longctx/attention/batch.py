"""The packed batch that one forward pass computes, and what an attention layer is told about itself.

Shape legend: T tokens in the batch, B segments (one per sequence), R rows whose logits are wanted, P pages of the
longest block table, D rotary dimensions, S query rows of ranges.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from memory.pages import PagePool

if TYPE_CHECKING:
    from longctx.attention.core_batch import CoreBatch
    from longctx.attention.landmark_batch import LandmarkRows


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What one attention layer is: constant over its life."""

    layer_idx: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None  # query i sees keys j with 0 <= i - j < window; None: all earlier keys


@dataclass(slots=True)
class PackedBatch:
    """Tokens of several sequences, packed, with where their KV goes. Integer tensors live on the model's device."""

    input_ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64, position within the sequence
    slots_T: torch.Tensor  # int64, page * page_size + offset of each token's KV; -1: it is not stored
    cu_seqlens_B1: torch.Tensor  # int32 [B + 1], segment borders in T
    kv_lens_B: torch.Tensor  # int32, keys of each sequence once this batch is stored
    block_tables_BP: torch.Tensor  # int32, page ids in sequence order, padded with 0
    logit_rows_R: torch.Tensor  # int64, rows of T
    max_q_len: int
    max_kv_len: int
    pool: PagePool
    num_decode: int = 0  # segments in front that are one token of a decoding sequence each
    chunk_lens: tuple[tuple[int, int], ...] | None = None  # (tokens, keys) of those behind; None: read the tensors
    rope_lens_T: torch.Tensor | None = None  # int64, the length that length-dependent RoPE scaling sees at each token
    cos_TD: torch.Tensor | None = None  # float32, set by the decoder
    sin_TD: torch.Tensor | None = None
    on_layer: Callable[[int], None] | None = None  # called with a layer's index once its KV is stored
    landmark: "LandmarkRows | None" = None  # of landmark attention
    cores: "CoreBatch | None" = None  # under CCA attention

    @property
    def num_segments(self) -> int:
        return self.kv_lens_B.shape[0]


@dataclass(slots=True)
class HeadPages:
    """Query rows that each see all keys of one page and KV head: B segments of S rows. On the model's device."""

    cu_seqlens_B1: torch.Tensor  # int32 [B + 1], segment borders in S
    pages_B: torch.Tensor  # int64
    kv_heads_B: torch.Tensor  # int64


@dataclass(slots=True)
class KeyRanges:
    """Query rows that each see one range of their segment's keys: B segments of S rows. On the model's device.

    Key t of a segment is slot ``t % page_size`` of page ``table[t // page_size]``. Ranges are counted over the
    segment's table, which need not hold all of the sequence's pages.
    """

    cu_seqlens_B1: torch.Tensor  # int32 [B + 1], segment borders in S
    block_tables_BP: torch.Tensor  # int32, page ids in key order; rows may share memory (stride 0)
    first_S: torch.Tensor  # int32, the first key that a row sees
    last_S: torch.Tensor  # int32, one after the last key that it sees; first >= last: it sees nothing
