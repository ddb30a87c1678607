"""One rank under CCA attention: the same pages as every other, and its part of each step's tokens."""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch

from longctx.engine.core_step import CoreStep, lay_cores
from longctx.models.packed import PackedDecoder
from longctx.shards.core_attention import SHARE_TAG, CoreShare, CoreShareBatch, SharedCoreAttention
from longctx.shards.core_rank_step import CoreRankStep, CoreStepReader
from longctx.shards.exports import OwnPages, RankExports
from memory.lower_pages import LowerPages
from memory.pages import PagePool
from memory.same_pages import SamePages
from parallel.carrier import Carrier, Message, finish

HANDED_TAG = SHARE_TAG + 1
HANDED_BYTES = 16 << 20  # of one message


class CoreRank:
    """Runs the model on this rank's tokens; the interface is ``ShardRank``'s.

    Args:
        decoder: the model, its backend a ``SharedCoreAttention``.
        pool: this rank's pages.
        below: what lies below them, where groups are fetched.
        group: all ranks, in host memory.
        timeout_s: longest wait for one of them.
    """

    def __init__(
        self,
        decoder: PackedDecoder,
        pool: PagePool,
        *,
        below: LowerPages | None = None,
        group: Carrier,
        timeout_s: float,
    ) -> None:
        assert isinstance(decoder.backend, SharedCoreAttention)
        self.decoder, self.pool, self.rank, self.world_size = decoder, pool, group.rank, group.world_size
        self._group, self._timeout_s = group, timeout_s
        self.exports = RankExports(OwnPages(), pool)
        self._attention, self._pages = decoder.backend, SamePages(pool, below)

    def make_reader(self) -> CoreStepReader:
        """Of what rank 0 tells."""
        return CoreStepReader()

    @torch.inference_mode()
    def compute(
        self, step: CoreRankStep, on_layer: Callable[[int], None] | None = None
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """As ``ShardRank.compute``."""
        if self.rank:  # rank 0 has made them when it scheduled
            self._pages.repeat(step.copies)
        self._hand_over(step.arrived)
        arrays = step.arrays
        borders = tuple(len(arrays.positions_T) * rank // self.world_size for rank in range(self.world_size + 1))
        owners = np.searchsorted(borders, arrays.logit_rows_R, side="right") - 1
        rows_of = [np.flatnonzero(owners == rank).tolist() for rank in range(self.world_size)]
        batch = self._lay_out(arrays, borders, on_layer)
        if len(batch.input_ids_T):
            return self.decoder.hidden(batch), rows_of
        for shape in self.decoder.attention_shapes:
            no_queries = torch.empty((0, shape.num_heads, shape.head_dim), dtype=self.decoder.dtype)
            self._attention.share(no_queries.to(self.decoder.device), shape, batch)
            if on_layer is not None:
                on_layer(shape.layer_idx)
        return self.decoder.no_hidden(), rows_of

    def close(self) -> None:
        """Nothing is computed any more."""

    def _hand_over(self, pages: Sequence[int]) -> None:
        """Rank 0 sends these as they are to all others, some of one layer at a time."""
        block_bytes = self.pool.layout.block_bytes
        size = max(1, HANDED_BYTES // block_bytes)
        parts = [pages[start : start + size] for start in range(0, len(pages), size)]
        for layer_idx, part in product(range(self.pool.layout.num_layers), parts):
            if self.rank == 0:
                blocks = self._pages.read(layer_idx, part).view(-1)
                sends = [Message(blocks, peer, HANDED_TAG) for peer in range(1, self.world_size)]
                finish(self._group.post(sends, [])[0], self.rank, self._timeout_s)
            else:
                blocks = torch.empty(len(part) * block_bytes, dtype=torch.uint8)
                finish(self._group.post([], [Message(blocks, 0, HANDED_TAG)])[1], self.rank, self._timeout_s)
                self._pages.write(layer_idx, part, blocks.view(len(part), -1))

    def _lay_out(
        self, step: CoreStep, borders: Sequence[int], on_layer: Callable[[int], None] | None
    ) -> CoreShareBatch:
        own = slice(*borders[self.rank : self.rank + 2])
        group_size_T = step.group_sizes_B[step.row_T]
        ending_E = np.flatnonzero((step.positions_T + 1) % group_size_T == 0)
        share = CoreShare(
            tuple(borders),
            self._upload(step.slots_T, torch.int64),
            self._upload(ending_E, torch.int64),
            tuple(np.searchsorted(ending_E, borders).tolist()),
        )
        cores = lay_cores(step, self._upload, own=own)
        logit_rows = step.logit_rows_R[(step.logit_rows_R >= own.start) & (step.logit_rows_R < own.stop)]
        cu_seqlens_B1 = cores.near.cu_seqlens_B1
        return CoreShareBatch(
            input_ids_T=self._upload(step.input_ids_T[own], torch.int64),
            positions_T=self._upload(step.positions_T[own], torch.int64),
            slots_T=share.slots_S[own],
            cu_seqlens_B1=cu_seqlens_B1,
            kv_lens_B=torch.zeros(len(cu_seqlens_B1) - 1, dtype=torch.int32, device=cu_seqlens_B1.device),
            block_tables_BP=cores.near.block_tables_BP,
            logit_rows_R=self._upload(logit_rows - own.start, torch.int64),
            max_q_len=int(cu_seqlens_B1.diff().max()) if len(cu_seqlens_B1) > 1 else 0,
            max_kv_len=int(step.kv_lens_B.max()),
            pool=self.pool,
            on_layer=on_layer,
            cores=cores,
            share=share,
        )

    def _upload(self, array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(array, dtype=dtype).to(self.decoder.device, non_blocking=True)
