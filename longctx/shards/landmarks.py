"""Landmark attention over ranks: blocks stay where they were computed, queries travel to those that they chose.

A token is computed where its own block lies. Every rank has the keys of all ranks' landmarks, in a table by rank 0's
page numbers, and so chooses its rows' blocks by itself.

    post keys of the landmarks that the step made here;   meanwhile attend own blocks
    wait for the others' keys, choose
    exchange what rows see of blocks elsewhere (``block_exchange.py``);   meanwhile attend chosen blocks here

Legend: T this rank's rows, S rows of one KV head that see a block, B blocks that they see, H query heads, D head dim.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from longctx.attention.backend import AttentionBackend
from longctx.attention.batch import AttentionShape, HeadPages, PackedBatch
from longctx.attention.landmark_paged import LandmarkAttention
from longctx.attention.landmark_retrieval import Retrieval
from longctx.models.attention_spec import LandmarkSpec
from longctx.models.rope import RotaryTable
from longctx.shards.attention import ShardBatch
from longctx.shards.block_exchange import BlockExchange, BlockRows
from longctx.shards.landmark_gather import LandmarkGather
from longctx.shards.layout import StepLayout, pad_tables, split_by_rank
from memory.landmark_keys import LandmarkKeys, make_landmark_table
from memory.pages import PagePool
from memory.rank_tiers import RankTiers
from parallel.carrier import Carrier, drive


class ShardedLandmarks(LandmarkAttention):
    """Landmark attention of a model whose sequences lie on several ranks.

    Args:
        inner: attends pages of this rank.
        pages: this rank's; all ranks have as many.
        rotary: of the model.
        spec, retrieval: see ``LandmarkAttention``.
        carrier: to the other ranks.
        timeout_s: longest wait for one of them.
    """

    def __init__(
        self,
        inner: AttentionBackend,
        pages: PagePool | RankTiers,
        rotary: RotaryTable,
        *,
        spec: LandmarkSpec,
        retrieval: Retrieval,
        carrier: Carrier,
        timeout_s: float,
    ) -> None:
        self._carrier, self._timeout_s = carrier, timeout_s
        self._pages_per_rank, self._num_layers = pages.num_pages, pages.layout.num_layers
        table = make_landmark_table(pages.layout, carrier.world_size * pages.num_pages, rotary.device)
        tiers = pages if isinstance(pages, RankTiers) else None
        super().__init__(inner, table, rotary, spec=spec, retrieval=retrieval, tiers=tiers)
        self._made = LandmarkKeys(pages.landmarks) if isinstance(pages, PagePool) else pages.landmark_keys

    def _insert_landmarks(self, batch: PackedBatch) -> PackedBatch:
        """Tables are of rank 0's numbers, but for what this rank's own rows write and see."""
        tables = pad_tables([segment.pages for segment in _layout_of(batch).segments])
        tables_BP = torch.from_numpy(tables).to(batch.positions_T.device)
        batch = super()._insert_landmarks(replace(batch, block_tables_BP=tables_BP))
        rows = batch.landmark
        assert rows is not None
        rows.own.block_tables_BP = tables_BP % self._pages_per_rank
        rows.landmark_pages_L %= self._pages_per_rank
        return batch

    def attend(self, q_THD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        assert batch.landmark is not None
        pages = _layout_of(batch).filled_pages
        arriving = self._send_keys(shape.layer_idx, pages)
        own = self.inner.attend_ranges(q_THD, shape, batch.landmark.own, batch.pool)
        self._take_keys(shape.layer_idx, pages, arriving)
        return self._attend_earlier(q_THD, own, shape, batch)

    def exchange(self, q_THD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        """``attend`` of a rank without tokens, for the others. Raises ``ExchangeError`` if a rank is lost."""
        if batch.on_layer is not None:
            batch.on_layer(shape.layer_idx)
        return self.attend(q_THD, shape, batch)

    def share(self, pages: Sequence[int]) -> None:
        """Give all ranks the landmarks of pages that another worker computed and sent, as rank 0 numbers them.

        All ranks call it. Raises ``ExchangeError`` if a rank is lost.
        """
        own = split_by_rank(
            np.array(pages, dtype=np.int64), world_size=self._carrier.world_size, pages_per_rank=self._pages_per_rank
        )
        arriving = [self._send_keys(layer_idx, own) for layer_idx in range(self._num_layers)]
        for layer_idx, keys in enumerate(arriving):
            self._take_keys(layer_idx, own, keys)

    def _send_keys(self, layer_idx: int, pages: Sequence[np.ndarray]) -> LandmarkGather:
        own = torch.from_numpy(pages[self._carrier.rank] % self._pages_per_rank).to(self._cos_SD.device)
        keys_LKD, counts = self._made.read(layer_idx, own), [len(each) for each in pages]
        return LandmarkGather(self._carrier, keys_LKD, counts=counts, layer_idx=layer_idx)

    def _take_keys(self, layer_idx: int, pages: Sequence[np.ndarray], arriving: LandmarkGather) -> None:
        keys_LKD = arriving.finish(self._timeout_s)
        self._keys.write(layer_idx, torch.from_numpy(np.concatenate(pages)).to(keys_LKD.device), keys_LKD)

    def _see_whole(
        self, q_SD: torch.Tensor, seen: HeadPages, shape: AttentionShape, batch: PackedBatch
    ) -> torch.Tensor:
        layout, carrier, page_B, border_B1 = _layout_of(batch), self._carrier, seen.pages_B, seen.cu_seqlens_B1
        blocks_3B = torch.stack((page_B, seen.kv_heads_B, border_B1.diff().long()))
        ranks = range(carrier.world_size)
        # pages ascend, so that what each rank is asked lies behind each other
        first_pages = torch.arange(len(ranks) + 1, device=page_B.device) * self._pages_per_rank
        blocks = torch.searchsorted(page_B, first_pages)
        borders, row_borders = torch.stack((blocks, border_B1[blocks])).tolist()
        asked = [
            BlockRows(
                blocks_3B[:, borders[rank] : borders[rank + 1]].contiguous(),
                q_SD[row_borders[rank] : row_borders[rank + 1]],
            )
            for rank in ranks
        ]

        def see(rows: BlockRows) -> torch.Tensor:
            pages, kv_heads, counts = rows.blocks_3B
            borders = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
            here = HeadPages(borders, pages % self._pages_per_rank, kv_heads)
            return self._see_here(rows.q_SD, here, shape, batch)

        exchange = BlockExchange(
            carrier,
            asked,
            holders=[rank for rank in ranks if layout.looks_at(carrier.rank, rank)],
            askers=[rank for rank in ranks if layout.looks_at(rank, carrier.rank)],
            see=see,
        )
        drive(exchange.run(), carrier.rank, self._timeout_s)
        if self._tiers is not None:
            self._tiers.end_layer(shape.layer_idx)
        return torch.cat(exchange.seen)


def _layout_of(batch: PackedBatch) -> StepLayout:
    assert isinstance(batch, ShardBatch) and batch.plans is not None
    return batch.plans.layout
