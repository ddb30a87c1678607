"""One rank of a sharded engine: its pages, and its part of every step."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

from longctx.models.packed import PackedDecoder
from longctx.shards.attention import ShardBatch, ShardedAttention
from longctx.shards.exports import OwnPages, RankExports
from longctx.shards.landmarks import ShardedLandmarks
from longctx.shards.layout import StepLayout
from longctx.shards.plans import PlanChoice, StepPlans
from longctx.shards.step import Step, StepReader
from memory.pages import PagePool
from memory.prefix_store import PrefixStore
from memory.rank_tiers import RankTiers


class ShardRank:
    """Runs the model on this rank's tokens.

    Args:
        decoder: the model, its backend one that exchanges.
        pages: this rank's; with tiers, ``pool`` is what lies below.
        rank, world_size: which of how many.
        pages_per_rank: the same on all; what rank 0 numbers pages by.
        choice: how prompts are exchanged.
        store: where its pages of prefixes are kept; None: nowhere.
    """

    def __init__(
        self,
        decoder: PackedDecoder,
        pages: PagePool | RankTiers,
        *,
        rank: int,
        world_size: int,
        pages_per_rank: int,
        choice: PlanChoice,
        store: PrefixStore | None = None,
    ) -> None:
        assert isinstance(decoder.backend, ShardedAttention | ShardedLandmarks)
        self.decoder, self.rank, self.world_size = decoder, rank, world_size
        self._pages, self._tiers = pages, pages if isinstance(pages, RankTiers) else None
        self.pool, self._near = (pages.below, pages.near) if isinstance(pages, RankTiers) else (pages, pages)
        self.own = OwnPages(rank, pages_per_rank)
        self.exports = RankExports(self.own, pages)
        self._attention = decoder.backend
        self._pages_per_rank, self._choice, self._store = pages_per_rank, choice, store

    def make_reader(self) -> StepReader:
        """Of what rank 0 tells."""
        return StepReader()

    @torch.inference_mode()
    def compute(
        self, step: Step, on_layer: Callable[[int], None] | None = None
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """This rank's rows of what is sampled from, and whose rows those of the step are.

        Args:
            step: what all ranks compute.
            on_layer: called with a layer's index once its keys are stored here.

        Returns:
            Normalised hidden states ``[R, C]``; and for each rank which of the step's sampled rows it has, in order.

        Raises:
            ExchangeError: if a rank is lost.

        Of an errand it returns one row of integers for each rank: the first page that it could not load, or how many
        were to be loaded, and ``PrefixStore.count_pages``.
        """
        self._prepare(step)
        if step.is_errand:
            return self._load(step), [[rank] for rank in range(self.world_size)]
        layout = StepLayout(
            step.segments,
            world_size=self.world_size,
            page_size=self.pool.layout.page_size,
            pages_per_rank=self._pages_per_rank,
        )
        sampled = [index for index, segment in enumerate(step.segments) if segment.samples]
        rows_of = [[] for _ in range(self.world_size)]
        for row, index in enumerate(sampled):
            rows_of[layout.owner_of_last(index)].append(row)
        batch = self._lay_out(layout, on_layer)
        hidden = self.decoder.hidden(batch) if len(batch.input_ids_T) else self._serve(batch)
        if self._tiers is not None:
            self._tiers.end_step()
        return hidden, rows_of

    def close(self) -> None:
        """Nothing is computed any more."""
        if self._store is not None and self.rank:  # rank 0's engine has its
            self._store.close()

    def _prepare(self, step: Step) -> None:
        """What is done before a step: what is saved may be a copy's target next, what arrived its source."""
        if step.saves:
            assert self._store is not None
            own, pages = self.own.select(0, [page for page, _ in step.saves])
            self._store.save([step.saves[index][1] for index in own], pages)
        if step.arrived:
            assert isinstance(self._attention, ShardedLandmarks)
            own = self.own.select(0, step.arrived)[1]
            self._pages.note_arrived(own, len(own))
            self._attention.share(step.arrived)
        for source, target in step.copies:
            if source // self._pages_per_rank == self.rank:
                self._pages.copy_page(source % self._pages_per_rank, target % self._pages_per_rank)

    def _load(self, step: Step) -> torch.Tensor:
        assert self._store is not None
        own, pages = self.own.select(0, [page for page, _ in step.loads])
        count = self._store.fill([step.loads[index][1] for index in own], pages)
        found = own[count] if count < len(own) else len(step.loads)
        return torch.tensor([[found, *self._store.count_pages().values()]])

    def _serve(self, batch: ShardBatch) -> torch.Tensor:
        """What the other ranks need of one without tokens; no hidden states."""
        laid_out = self._attention.lay_out(batch)
        for shape in self.decoder.attention_shapes:
            no_queries = torch.empty((0, shape.num_heads, shape.head_dim), dtype=self.decoder.dtype)
            self._attention.exchange(no_queries.to(self.decoder.device), shape, laid_out)
        return self.decoder.no_hidden()

    def _lay_out(self, layout: StepLayout, on_layer: Callable[[int], None] | None) -> ShardBatch:
        rank, size = self.rank, self.pool.layout.page_size
        ids, positions, slots, lens, logit_rows = [], [], [], [], []
        borders = layout.first_queries[:, rank].tolist()
        for index, segment in enumerate(layout.segments):
            own = layout.positions(index, rank)
            positions.append(own)
            ids.append(segment.token_ids[own - segment.start])
            slots.append(segment.pages[own // size].astype(np.int64) % self._pages_per_rank * size + own % size)
            lens.append(np.maximum(own + 1, segment.rope_floor))
            if segment.samples and layout.owner_of_last(index) == rank:
                logit_rows.append(borders[index + 1] - 1)
        max_kv_len = max((segment.stop for segment in layout.segments), default=1)
        return ShardBatch(
            input_ids_T=self._tensor(ids),
            positions_T=self._tensor(positions),
            slots_T=self._tensor(slots),
            cu_seqlens_B1=self._tensor([borders], np.int32),
            kv_lens_B=self._tensor([layout.num_keys[:, rank]], np.int32),
            block_tables_BP=torch.empty((len(layout.segments), 0), dtype=torch.int32, device=self.decoder.device),
            logit_rows_R=self._tensor([logit_rows]),
            max_q_len=max((b - a for a, b in pairwise(borders)), default=1),
            max_kv_len=max_kv_len,
            pool=self._near,
            rope_lens_T=self._tensor(lens) if self.decoder.rotary.depends_on_length else None,
            on_layer=on_layer,
            plans=StepPlans(layout, rank, dtype=self.decoder.dtype, device=self.decoder.device, choice=self._choice),
        )

    def _tensor(self, parts: Sequence[Sequence[int] | np.ndarray], dtype: type = np.int64) -> torch.Tensor:
        joined = np.concatenate([np.asarray(part, dtype=dtype) for part in parts]) if parts else np.zeros(0, dtype)
        return torch.from_numpy(joined).to(self.decoder.device)
