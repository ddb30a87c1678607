"""Attention of one step over ranks: stores this rank's keys, then runs the step's exchange plan over paged KV.

Keys that lie here are attended where they lie, whoever's queries come; keys that travel are put into pages of a scratch
pool, so that one kernel does both. (TokenRing, Ring Attention and pass-Q are plans: ``parallel/plans``.)

Legend: T this rank's tokens, S rows of one work, H query heads, K KV heads, D head dim, L key rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from longctx.attention.backend import AttentionBackend, HeadNorm
from longctx.attention.batch import AttentionShape, PackedBatch
from longctx.attention.outer import OuterAttention
from longctx.shards.plans import RankPlan, StepPlans
from memory.page_rows import read_rows, write_rows
from memory.pages import PagePool
from parallel.carrier import Carrier, drive
from parallel.exchange import ForwardExchange, Held, Key
from parallel.merge import merge_partial_
from parallel.plan import Work
from parallel.tile_attention import split_heads


@dataclass(slots=True)
class ShardBatch(PackedBatch):
    """A batch of this rank's tokens."""

    plans: StepPlans | None = None


class ShardedAttention(OuterAttention):
    """An attention implementation whose sequences lie on several ranks.

    Args:
        local: attends pages of this rank.
        carrier: to the other ranks.
        timeout_s: longest wait for one of them.
    """

    def __init__(self, local: AttentionBackend, carrier: Carrier, *, timeout_s: float) -> None:
        super().__init__(local, local.name)
        self._carrier, self._timeout_s = carrier, timeout_s
        self._scratch: _Scratch | None = None

    def forward(
        self, qkv_TC: torch.Tensor, norm: HeadNorm | None, shape: AttentionShape, batch: PackedBatch
    ) -> torch.Tensor:
        q_THD = self.inner.prepare(qkv_TC, norm, shape, batch)
        return self.exchange(q_THD, shape, batch)

    def exchange(self, q_THD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        """After this rank's keys are stored: ``[T, H * D]``. Also called by a rank without tokens, for the others.

        Raises ``ExchangeError`` if a rank is lost.
        """
        assert isinstance(batch, ShardBatch) and batch.plans is not None
        if batch.on_layer is not None:
            batch.on_layer(shape.layer_idx)
        plan = batch.plans.of(shape)
        if plan.sends_keys:
            keys = read_rows(batch.pool, shape.layer_idx, batch.plans.key_slots_L)
        else:
            keys = (q_THD.new_empty((0, shape.num_kv_heads, shape.head_dim)),) * 2
        if self._scratch is None:
            self._scratch = _Scratch(batch.pool)
        scratch = self._scratch
        run = _PagedForward(
            plan, self._carrier, q_THD, keys, local=self.inner, shape=shape, pool=batch.pool, scratch=scratch
        )
        drive(run.run(), self._carrier.rank, self._timeout_s)
        return run.out[0].to(q_THD.dtype).flatten(1)

    def attend(self, q_THD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        return self.exchange(q_THD, shape, batch)


class _PagedForward(ForwardExchange):
    def __init__(
        self,
        plan: RankPlan,
        carrier: Carrier,
        q_THD: torch.Tensor,
        keys: Sequence[torch.Tensor],
        *,
        local: AttentionBackend,
        shape: AttentionShape,
        pool: PagePool,
        scratch: "_Scratch",
    ) -> None:
        self._ranges, self._local, self._shape, self._pool = plan.works, local, shape, pool
        self._scratch = scratch
        own = {"q": (q_THD[None],), "kv": tuple(part[None] for part in keys)}
        super().__init__(plan.plan, carrier.rank, carrier, own)

    def compute(self, work: Work, q: Held, kv: Held) -> None:
        work_ranges, sums = self._ranges[id(work)], self.sums_for(work, "q")
        parts = [q.cut(start, stop)[0][0] for start, stop in work_ranges.q_rows]
        q_SHD = parts[0] if len(parts) == 1 else torch.cat(parts)
        ranges, pool, layer_idx = work_ranges.ranges, self._pool, self._shape.layer_idx
        first_kv_head = self.plan.problem.kv_heads(work.heads)[0]
        if work.kv_owner != self.rank:
            pages = self._scratch.write(("kv", work.kv_owner, work.heads), kv)
            ranges = replace(ranges, block_tables_BP=pages.expand(len(ranges.block_tables_BP), -1))
            pool, layer_idx, first_kv_head = self._scratch.pool, 0, 0
        for hs, ks in split_heads(work.heads, self.plan.problem.group_size):
            shape = replace(
                self._shape,
                layer_idx=layer_idx,
                num_heads=hs.stop - hs.start,
                num_kv_heads=ks.stop - ks.start,
            )
            out_SHD, lse_SH = self._local.attend_ranges(
                q_SHD[:, hs], shape, ranges, pool, first_kv_head=first_kv_head + ks.start
            )
            self._add(sums, work_ranges.q_rows, hs, out_SHD, lse_SH)

    def dropped(self, key: Key) -> None:
        self._scratch.free(key)

    @staticmethod
    def _add(sums: Held, q_rows: Sequence[tuple[int, int]], hs: slice, out: torch.Tensor, lse: torch.Tensor) -> None:
        place = 0
        for start, stop in q_rows:
            own_out, own_lse = sums.cut(start, stop)
            rows = slice(place, place + stop - start)
            merge_partial_(own_out[0, :, hs], own_lse[0, :, hs], out[rows], lse[rows])
            place += stop - start


class _Scratch:
    """Pages for keys that travelled, of one layer at a time; grown as needed."""

    def __init__(self, pool: PagePool) -> None:
        self._layout = replace(pool.layout, num_layers=1)
        self._device = pool.storage.device
        self.pool = PagePool(self._layout, 0, device=self._device)
        self._held: dict[Key, list[int]] = {}

    def write(self, key: Key, kv: Held) -> torch.Tensor:
        """Put what a move brought into pages, once; their ids, int32, in the order of the rows."""
        k_LKD, v_LKD = (tensor[0] for tensor in kv.tensors)
        if key not in self._held:
            num_rows = k_LKD.shape[0]
            self._held[key] = self._allocate(self._layout.num_pages(num_rows))
            starts = torch.tensor(self._held[key])[:, None] * self._layout.page_size
            slots = (starts + torch.arange(self._layout.page_size)).view(-1)[:num_rows].to(self._device)
            write_rows(self.pool, 0, slots, k_LKD, v_LKD)
        return torch.tensor(self._held[key], dtype=torch.int32, device=self._device)

    def free(self, key: Key) -> None:
        """The pages of ``key`` may be used again."""
        pages = self._held.pop(key, None)
        if pages is not None:
            self.pool.reclaim(self.pool.release(pages))

    def _allocate(self, num_pages: int) -> list[int]:
        pages = self.pool.allocate(num_pages)
        if pages is None:
            self._grow(num_pages)
            pages = self.pool.allocate(num_pages)
            assert pages is not None
        return sorted(pages)

    def _grow(self, num_pages: int) -> None:
        """A larger pool; what is held keeps its ids and bytes."""
        old, held = self.pool, [page for pages in self._held.values() for page in pages]
        self.pool = PagePool(self._layout, 2 * (old.num_pages + num_pages), device=self._device)
        self.pool.storage[:, : old.num_pages].copy_(old.storage)
        taken = self.pool.allocate(self.pool.num_pages)
        assert taken is not None
        self.pool.reclaim(self.pool.release([page for page in taken if page not in set(held)]))
