"""CCA attention of a step whose tokens are divided among ranks that all hold the same pages.

What a sequence keeps is small, L / g cores and a window, so that every rank has it whole: each layer, a rank sends the
keys and values of its tokens to all others, with the queries that weigh the groups which end in the step, and every
rank makes every core. Queries, the larger part of attention, stay where they are, and so do the rows of all linear
layers.

Legend: T this rank's tokens, S tokens of the step, E tokens that end a group, H query heads, K KV heads, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from longctx.attention.backend import AttentionBackend, HeadNorm
from longctx.attention.batch import AttentionShape, PackedBatch
from longctx.attention.cca_paged import CoreAttention
from longctx.attention.core_fetch import CoreFetch
from longctx.models.attention_spec import CCASpec
from longctx.models.rope import RotaryTable
from memory.page_rows import read_rows, write_rows
from parallel.carrier import Carrier, Message, bytes_of, finish

SHARE_TAG = 1 << 22  # beside the tags of exchange plans and of numbers


@dataclass(frozen=True, slots=True, eq=False)
class CoreShare:
    """Who computes which tokens of a step. On the model's device."""

    borders: tuple[int, ...]  # rank r has tokens borders[r] to borders[r + 1] of the step
    slots_S: torch.Tensor  # int64
    ending_E: torch.Tensor  # int64, tokens of the step that end a group, ascending
    ending_borders: tuple[int, ...]  # the same of those


@dataclass(slots=True)
class CoreShareBatch(PackedBatch):
    """A batch of this rank's tokens."""

    share: CoreShare | None = None


class SharedCoreAttention(CoreAttention):
    """``CoreAttention`` of several ranks.

    Args:
        base, rotary, spec, fetch: as there.
        carrier: to the other ranks.
        timeout_s: longest wait for one of them.
    """

    def __init__(
        self,
        base: AttentionBackend,
        rotary: RotaryTable,
        spec: CCASpec,
        carrier: Carrier,
        *,
        timeout_s: float,
        fetch: CoreFetch | None = None,
    ) -> None:
        super().__init__(base, rotary, spec, fetch=fetch)
        self._carrier, self._timeout_s = carrier, timeout_s

    def prepare(
        self, qkv_TC: torch.Tensor, norm: HeadNorm | None, shape: AttentionShape, batch: PackedBatch
    ) -> torch.Tensor:
        q_THD = self.inner.prepare(qkv_TC, norm, shape, batch)
        self.share(q_THD, shape, batch)
        return q_THD

    def share(self, q_THD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> None:
        """Store the tokens of all ranks and make the step's cores. Also called by a rank without tokens.

        Raises ``ExchangeError`` if a rank is lost.
        """
        assert isinstance(batch, CoreShareBatch) and batch.share is not None and batch.cores is not None
        share, rank, dim = batch.share, self._carrier.rank, shape.head_dim
        own, own_ending = (slice(*borders[rank : rank + 2]) for borders in (share.borders, share.ending_borders))
        k_TKD, v_TKD = read_rows(batch.pool, shape.layer_idx, share.slots_S[own])
        q_EHD = q_THD.new_empty((len(share.ending_E), shape.num_heads, dim))
        q_EHD[own_ending] = q_THD[share.ending_E[own_ending] - own.start]
        sizes = [
            (stop - start, last - first)
            for (start, stop), (first, last) in zip(
                pairwise(share.borders), pairwise(share.ending_borders), strict=True
            )
        ]
        arrived = self._exchange((k_TKD, v_TKD, q_EHD[own_ending]), sizes)
        for peer, (k, v, q) in arrived.items():
            theirs, ending = (slice(*borders[peer : peer + 2]) for borders in (share.borders, share.ending_borders))
            if len(k):
                write_rows(batch.pool, shape.layer_idx, share.slots_S[theirs], k, v)
            q_EHD[ending] = q
        for groups in batch.cores.ending:
            rows_N = torch.searchsorted(share.ending_E, groups.last_rows_N)
            self.pool_groups(q_EHD[rows_N], groups, shape, batch.pool)

    def _exchange(
        self, own: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Send ``own`` keys, values and queries to every other rank; theirs, by rank.

        Args:
            own: ``[T, K, D]`` twice and ``[E, H, D]``.
            sizes: tokens of each rank, and how many of them end a group.
        """
        rank = self._carrier.rank
        peers = [peer for peer in range(self._carrier.world_size) if peer != rank]
        sent = torch.cat([bytes_of(part.contiguous()) for part in own])
        row_bytes = [part.element_size() * part.shape[1] * part.shape[2] for part in own]
        buffers = {}
        for peer in peers:
            num_tokens, num_ending = sizes[peer]
            count = num_tokens * (row_bytes[0] + row_bytes[1]) + num_ending * row_bytes[2]
            buffers[peer] = sent.new_empty(count)
        sends = [Message(sent, peer, SHARE_TAG) for peer in peers if len(sent)]
        receives = [Message(buffer, peer, SHARE_TAG) for peer, buffer in buffers.items() if len(buffer)]
        going, coming = self._carrier.post(sends, receives)
        finish([*coming, *going], rank, self._timeout_s)
        return {peer: _split(buffer, own, sizes[peer], row_bytes) for peer, buffer in buffers.items()}


def _split(
    buffer: torch.Tensor, like: Sequence[torch.Tensor], size: tuple[int, int], row_bytes: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    counts = [size[0] * row_bytes[0], size[0] * row_bytes[1], size[1] * row_bytes[2]]
    k, v, q = (
        part.view(tensor.dtype).view(-1, *tensor.shape[1:])
        for part, tensor in zip(buffer.split(counts), like, strict=True)
    )
    return k, v, q
