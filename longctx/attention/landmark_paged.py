"""Landmark attention over paged KV, around any implementation of dense attention to ranges of keys.

    prepare   split, normalise, rotate by the position in the block, store; landmarks' keys go to their own table
    own       dense attention to the own block, with its log-sum-exp
    choose    landmarks are scored, k blocks chosen (``landmark_retrieval.py``)
    gates     one softmax over the own block's tokens and the chosen landmarks, at their final slots
    blocks    dense attention inside each chosen block, times its gate

Rows that chose the same block are computed together: a block is a segment whose rows are those that see it, whole.

Legend: T rows, L landmarks, H query heads, K KV heads, G = H / K, D head dim, k retrieved blocks, S rows of one KV head
that see a block, B blocks that they see.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch

from longctx.attention.backend import AttentionBackend, HeadNorm, rms_norm, rotate
from longctx.attention.batch import AttentionShape, KeyRanges, PackedBatch
from longctx.attention.landmark_batch import LandmarkRows, insert_landmarks
from longctx.attention.landmark_retrieval import Choice, Retrieval, choose_blocks
from longctx.models.attention_spec import LandmarkSpec
from longctx.models.rope import RotaryTable
from memory.landmark_keys import LandmarkKeys
from memory.tiered_pages import TieredPages

SHORT_ROWS = 2  # rows of a segment that decodes: the token, and perhaps a landmark


class LandmarkAttention(AttentionBackend):
    """Landmark attention, of a model that was trained with it.

    Args:
        inner: computes norms, activations, and dense attention to ranges of keys.
        keys: the landmarks' keys, by page.
        rotary: of the model.
        spec: what the model was trained with; a page holds a block.
        retrieval: which blocks a token sees.
        skip_below: blocks are not looked at where all landmarks together would get less than this share.
        tiers: where blocks are, if not all of them are near.
    """

    def __init__(
        self,
        inner: AttentionBackend,
        keys: LandmarkKeys,
        rotary: RotaryTable,
        *,
        spec: LandmarkSpec,
        retrieval: Retrieval,
        skip_below: float = 0.0,
        tiers: TieredPages | None = None,
    ) -> None:
        block_size = spec.block_size
        self.inner, self._keys, self._spec, self._block_size = inner, keys, spec, block_size
        self._retrieval, self._skip_below, self._tiers = retrieval, skip_below, tiers
        self.name, self.kv_order = f"landmark ({inner.name})", inner.kv_order
        self.page_sizes, self.max_group = (block_size,), inner.max_group
        distance = torch.arange(retrieval.top_k + 2, device=rotary.device) * (block_size + 1)
        rotary.reserve(int(distance[-1]) + 1)
        lengths = None if rotary.length_threshold is None else torch.ones_like(distance)
        cos_SD, sin_SD = rotary.lookup(distance, lengths)
        self._cos_SD, self._sin_SD = (x / rotary.attention_scaling for x in (cos_SD, sin_SD))  # it is in q already

    depends_on_length = False

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def lay_out(self, batch: PackedBatch) -> PackedBatch:
        """Put landmarks in; with tiers, tokens go to the frames of the pages that they fill."""
        batch = insert_landmarks(batch, block_size=self._block_size, landmark_token_id=self._spec.landmark_token_id)
        if self._tiers is None:
            return batch
        rows, size, device = _rows_of(batch), self._block_size, batch.slots_T.device
        slots = batch.slots_T.cpu()
        pages, is_text = slots // size, slots >= 0
        self._tiers.begin_step(pages[is_text].unique().tolist(), rows.landmark_pages_L.tolist())
        frames = self._tiers.staged(pages.clamp_min(0))
        table = self._tiers.staged(batch.block_tables_BP[:, : rows.num_blocks].cpu().long()).clamp_min(0)
        rows.own.block_tables_BP = table.int().to(device)  # of own blocks, which are being filled
        return replace(batch, slots_T=torch.where(is_text, frames * size + slots % size, -1).to(device))

    def store(self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> None:
        raise AssertionError("prepare stores")

    def prepare(
        self, qkv_TC: torch.Tensor, norm: HeadNorm | None, shape: AttentionShape, batch: PackedBatch
    ) -> torch.Tensor:
        """As the base class says; landmarks' keys are stored as well."""
        rows = _rows_of(batch)
        if len(rows.landmark_rows_L):
            self._store_landmarks(qkv_TC[rows.landmark_rows_L], norm, shape, batch)
        return self.inner.prepare(qkv_TC, norm, shape, batch)

    def attend(self, q_THD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        """``[T, H * D]`` in q's dtype."""
        rows = _rows_of(batch)
        own_THD, own_TH = self.inner.attend_ranges(q_THD, shape, rows.own, batch.pool)
        if rows.num_blocks > 1:
            q_TKGD = q_THD.unflatten(1, (shape.num_kv_heads, -1))
            choice = self._choose(q_TKGD, shape, batch)
            own_THD = self._see_blocks(q_TKGD, own_THD, own_TH, choice, shape, batch)
        return own_THD.to(q_THD.dtype).flatten(1)

    def rms_norm(self, x_TC: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self.inner.rms_norm(x_TC, weight, eps)

    def add_rms_norm(
        self, x_TC: torch.Tensor, addend_TC: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return self.inner.add_rms_norm(x_TC, addend_TC, weight, eps)

    def silu_mul(self, gate_up_TC: torch.Tensor) -> torch.Tensor:
        return self.inner.silu_mul(gate_up_TC)

    def _store_landmarks(
        self, qkv_LC: torch.Tensor, norm: HeadNorm | None, shape: AttentionShape, batch: PackedBatch
    ) -> None:
        rows = _rows_of(batch)
        k_LKD = qkv_LC.view(len(qkv_LC), -1, shape.head_dim)[:, shape.num_heads : shape.num_heads + shape.num_kv_heads]
        if norm is not None:
            k_LKD = rms_norm(k_LKD, norm.k_weight, norm.eps)
        assert batch.cos_TD is not None and batch.sin_TD is not None
        k_LKD = rotate(k_LKD, batch.cos_TD[rows.landmark_rows_L], batch.sin_TD[rows.landmark_rows_L])
        self._keys.write(shape.layer_idx, rows.landmark_pages_L, k_LKD)

    def _turn(self, q: torch.Tensor, num_slots: torch.Tensor) -> torch.Tensor:
        """Queries ``[..., D]``, so many slots further away from what they look at."""
        cos, sin = self._cos_SD[num_slots].to(q.dtype), self._sin_SD[num_slots].to(q.dtype)
        dim = cos.shape[-1]
        head, half = q[..., :dim], dim // 2
        swapped = torch.cat((-head[..., half:], head[..., :half]), -1)
        return torch.cat((head * cos + swapped * sin, q[..., dim:]), -1)

    def _choose(self, q_TKGD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> Choice:
        """Short segments together, each row with its own landmarks; of long ones each alone."""
        rows, table_BP = _rows_of(batch), batch.block_tables_BP[:, : _rows_of(batch).num_blocks].long()
        borders = batch.cu_seqlens_B1.tolist()
        long = [(a, b) for a, b in pairwise(borders) if b - a > SHORT_ROWS]
        is_short = torch.ones(len(q_TKGD), dtype=torch.bool, device=q_TKGD.device)
        groups: list[tuple[torch.Tensor | slice, torch.Tensor]] = []
        for start, stop in long:
            is_short[start:stop] = False
            num_blocks = max(1, int(rows.block_T[stop - 1]))
            groups.append((slice(start, stop), table_BP[rows.segment_T[start], :num_blocks]))
        short = is_short.nonzero()[:, 0]
        if len(short):
            num_blocks = max(1, int(rows.block_T[short].max()))
            groups.append((short, table_BP[rows.segment_T[short], :num_blocks]))
        shape_k = (*q_TKGD.shape[:3], self._retrieval.top_k)
        whole = Choice(*(torch.empty(shape_k, dtype=dtype, device=q_TKGD.device) for dtype in _CHOICE_DTYPES))
        for where, pages in groups:
            landmarks = self._keys.read(shape.layer_idx, pages)
            of_rows = rows.block_T[where], rows.run_T[where]
            part = choose_blocks(q_TKGD[where], landmarks, *of_rows, self._retrieval, self._turn)
            whole.block[where], whole.is_there[where], whole.num_slots[where] = (
                part.block, part.is_there, part.num_slots,
            )  # fmt: skip
        return whole

    def _see_blocks(
        self,
        q_TKGD: torch.Tensor,
        own_THD: torch.Tensor,
        own_TH: torch.Tensor,
        choice: Choice,
        shape: AttentionShape,
        batch: PackedBatch,
    ) -> torch.Tensor:
        """Own blocks' output and the chosen blocks', by their gates; float32 ``[T, H, D]``."""
        rows = _rows_of(batch)
        page_TKGk = batch.block_tables_BP[rows.segment_T[:, None, None, None], choice.block].long()
        q_TKGkD = self._turn(q_TKGD.unsqueeze(3).expand(-1, -1, -1, choice.block.shape[3], -1), choice.num_slots)
        kv_head = torch.arange(shape.num_kv_heads, device=q_TKGD.device)[None, :, None, None]
        landmarks_TKGkD = self._keys.read_heads(shape.layer_idx, page_TKGk, kv_head)
        scores_TKGk = (q_TKGkD.float() * landmarks_TKGkD.float()).sum(-1) * shape.scale
        scores_TKGk = scores_TKGk.masked_fill(~choice.is_there, float("-inf"))
        own_TKG = own_TH.unflatten(1, q_TKGD.shape[1:3])
        total_TKG = torch.logaddexp(own_TKG, scores_TKGk.logsumexp(-1))
        is_seen = choice.is_there
        if self._skip_below > 0:
            is_skipped = torch.exp(scores_TKGk - total_TKG[..., None]).sum(-1) < self._skip_below
            total_TKG = torch.where(is_skipped, own_TKG, total_TKG)
            is_seen = is_seen & ~is_skipped[..., None]
        gates_TKGk = torch.exp(scores_TKGk - total_TKG[..., None])
        out_TKGD = own_THD.unflatten(1, q_TKGD.shape[1:3]) * torch.exp(own_TKG - total_TKG)[..., None]
        for head in range(shape.num_kv_heads):
            self._add_head(out_TKGD, head, q_TKGkD, page_TKGk, gates_TKGk, is_seen, shape, batch)
        if self._tiers is not None:
            self._tiers.end_layer(shape.layer_idx, page_TKGk[is_seen].unique().cpu())
        return out_TKGD.flatten(1, 2)

    def _add_head(
        self,
        out_TKGD: torch.Tensor,
        head: int,
        q_TKGkD: torch.Tensor,
        page_TKGk: torch.Tensor,
        gates_TKGk: torch.Tensor,
        is_seen: torch.Tensor,
        shape: AttentionShape,
        batch: PackedBatch,
    ) -> None:
        """Add what the query heads of one KV head see of their blocks."""
        row_S, group_S, rank_S = is_seen[:, head].nonzero(as_tuple=True)
        if not len(row_S):
            return
        page_S, order = page_TKGk[row_S, head, group_S, rank_S].sort(stable=True)
        row_S, group_S, rank_S = row_S[order], group_S[order], rank_S[order]
        page_B, counts = page_S.unique_consecutive(return_counts=True)
        q_S1D = q_TKGkD[row_S, head, group_S, rank_S].unsqueeze(1)
        seen_SD = self._see_whole(q_S1D, page_B, counts, head, shape, batch)
        weighted_SD = seen_SD * gates_TKGk[row_S, head, group_S, rank_S][:, None]
        num_groups = out_TKGD.shape[2]
        flat = out_TKGD.new_zeros(len(out_TKGD) * num_groups, out_TKGD.shape[3])
        flat.index_add_(0, row_S * num_groups + group_S, weighted_SD)
        out_TKGD[:, head] += flat.unflatten(0, (-1, num_groups))

    def _see_whole(
        self,
        q_S1D: torch.Tensor,
        page_B: torch.Tensor,
        counts_B: torch.Tensor,
        head: int,
        shape: AttentionShape,
        batch: PackedBatch,
    ) -> torch.Tensor:
        """Attention ``[S, D]`` of rows to all of a block of one KV head each, the rows of a block after each other."""
        border_B1 = torch.cat((counts_B.new_zeros(1), counts_B.cumsum(0)))
        parts = [(slice(0, len(page_B)), page_B)] if self._tiers is None else self._look_at(page_B, shape)
        one_head, seen = replace(shape, num_heads=1, num_kv_heads=1), []
        for blocks, frame_B in parts:
            borders = border_B1[blocks.start : blocks.stop + 1]
            rows = q_S1D[int(borders[0]) : int(borders[-1])]
            first_S = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
            segments, table = (borders - borders[0]).int(), frame_B[:, None].int()
            ranges = KeyRanges(segments, table, first_S, first_S + self._block_size)
            seen.append(self.inner.attend_ranges(rows, one_head, ranges, batch.pool, first_kv_head=head)[0][:, 0])
        return torch.cat(seen)

    def _look_at(self, page_B: torch.Tensor, shape: AttentionShape) -> Iterator[tuple[slice, torch.Tensor]]:
        assert self._tiers is not None
        for part, frames in self._tiers.look_at(shape.layer_idx, page_B.cpu()):
            yield part, frames.to(page_B.device)


_CHOICE_DTYPES = (torch.int64, torch.bool, torch.int64)


def _rows_of(batch: PackedBatch) -> LandmarkRows:
    assert batch.landmark is not None, "a batch for landmark attention is made by insert_landmarks"
    return batch.landmark
