"""One rank under CCA attention: the same pages as every other, and its part of each step's tokens."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from longctx.engine.core_step import CoreStep, lay_cores
from longctx.models.packed import PackedDecoder
from longctx.shards.core_attention import CoreShare, CoreShareBatch, SharedCoreAttention
from longctx.shards.core_rank_step import CoreRankStep, CoreStepReader
from longctx.shards.exports import OwnPages, RankExports
from memory.lower_pages import LowerPages
from memory.pages import PagePool
from memory.same_pages import SamePages


class CoreRank:
    """Runs the model on this rank's tokens; the interface is ``ShardRank``'s.

    Args:
        decoder: the model, its backend a ``SharedCoreAttention``.
        pool: this rank's pages.
        below: what lies below them, where groups are fetched.
        rank, world_size: which of how many.
    """

    def __init__(
        self, decoder: PackedDecoder, pool: PagePool, *, below: LowerPages | None = None, rank: int, world_size: int
    ) -> None:
        assert isinstance(decoder.backend, SharedCoreAttention)
        self.decoder, self.pool, self.rank, self.world_size = decoder, pool, rank, world_size
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
