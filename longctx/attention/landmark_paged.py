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

from dataclasses import replace

import torch

from longctx.attention.backend import AttentionBackend, HeadNorm, rms_norm, rotate
from longctx.attention.batch import AttentionShape, HeadPages, PackedBatch
from longctx.attention.landmark_batch import LandmarkRows, RowGroup, insert_landmarks
from longctx.attention.landmark_retrieval import Choice, Retrieval, choose_blocks
from longctx.attention.outer import OuterAttention
from longctx.models.attention_spec import LandmarkSpec
from longctx.models.rope import RotaryTable
from memory.landmark_keys import LandmarkKeys
from memory.tiered_pages import TieredPages


class LandmarkAttention(OuterAttention):
    """Landmark attention, of a model that was trained with it.

    Args:
        inner: computes norms, activations, and dense attention to ranges of keys.
        keys: the landmarks' keys, by page.
        rotary: of the model.
        spec: what the model was trained with; a page holds a block.
        retrieval: which blocks a token sees.
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
        tiers: TieredPages | None = None,
    ) -> None:
        block_size = spec.block_size
        super().__init__(inner, f"landmark/{inner.name}")
        self._keys = self._made = keys  # what is read, and where new ones are written
        self._spec, self._block_size = spec, block_size
        self._retrieval, self._tiers = retrieval, tiers
        self.page_sizes = (block_size,)
        distance = torch.arange(retrieval.top_k + 2, device=rotary.device) * (block_size + 1)
        rotary.reserve(int(distance[-1]) + 1)
        lengths = None if rotary.length_threshold is None else torch.ones_like(distance)
        cos_SD, sin_SD = rotary.lookup(distance, lengths)
        self._cos_SD, self._sin_SD = (x / rotary.attention_scaling for x in (cos_SD, sin_SD))  # it is in q already

    depends_on_length = False

    def lay_out(self, batch: PackedBatch) -> PackedBatch:
        """Put landmarks in; with tiers, tokens go to the frames of the pages that they fill."""
        batch = self._insert_landmarks(batch)
        return batch if self._tiers is None else self._lay_in_frames(batch, self._tiers)

    def _insert_landmarks(self, batch: PackedBatch) -> PackedBatch:
        return insert_landmarks(batch, block_size=self._block_size, landmark_token_id=self._spec.landmark_token_id)

    def _lay_in_frames(self, batch: PackedBatch, tiers: TieredPages) -> PackedBatch:
        rows, size, device = _rows_of(batch), self._block_size, batch.slots_T.device
        slots = batch.slots_T.cpu()
        pages, is_text = slots // size, slots >= 0
        tiers.begin_step(
            pages[is_text].unique().tolist(),
            begun=pages[is_text & (slots % size == 0)].tolist(),
            filled=rows.landmark_pages_L.tolist(),
        )
        frames = tiers.staged(pages.clamp_min(0))
        table = tiers.staged(rows.own.block_tables_BP[:, : rows.num_blocks].cpu().long()).clamp_min(0)
        rows.own.block_tables_BP = table.int().to(device)  # of own blocks, which are being filled
        return replace(batch, slots_T=torch.where(is_text, frames * size + slots % size, -1).to(device))

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
        own = self.inner.attend_ranges(q_THD, shape, _rows_of(batch).own, batch.pool)
        return self._attend_earlier(q_THD, own, shape, batch)

    def _attend_earlier(
        self,
        q_THD: torch.Tensor,
        own: tuple[torch.Tensor, torch.Tensor],
        shape: AttentionShape,
        batch: PackedBatch,
    ) -> torch.Tensor:
        """From the own blocks' output and log-sum-exp to what ``attend`` returns."""
        own_THD, own_TH = own
        if _rows_of(batch).num_blocks > 1:
            q_TKGD = q_THD.unflatten(1, (shape.num_kv_heads, -1))
            choice = self._choose(q_TKGD, shape, batch)
            own_THD = self._see_blocks(q_TKGD, own_THD, own_TH, choice, shape, batch)
        return own_THD.to(q_THD.dtype).flatten(1)

    def _store_landmarks(
        self, qkv_LC: torch.Tensor, norm: HeadNorm | None, shape: AttentionShape, batch: PackedBatch
    ) -> None:
        rows = _rows_of(batch)
        k_LKD = qkv_LC.view(len(qkv_LC), -1, shape.head_dim)[:, shape.num_heads : shape.num_heads + shape.num_kv_heads]
        if norm is not None:
            k_LKD = rms_norm(k_LKD, norm.k_weight, norm.eps)
        assert batch.cos_TD is not None and batch.sin_TD is not None
        k_LKD = rotate(k_LKD, batch.cos_TD[rows.landmark_rows_L], batch.sin_TD[rows.landmark_rows_L])
        self._made.write(shape.layer_idx, rows.landmark_pages_L, k_LKD)

    def _turn(self, q: torch.Tensor, num_slots: torch.Tensor) -> torch.Tensor:
        """Queries ``[..., D]``, so many slots further away from what they look at."""
        cos, sin = self._cos_SD[num_slots].to(q.dtype), self._sin_SD[num_slots].to(q.dtype)
        dim = cos.shape[-1]
        head, half = q[..., :dim], dim // 2
        swapped = torch.cat((-head[..., half:], head[..., :half]), -1)
        return torch.cat((head * cos + swapped * sin, q[..., dim:]), -1)

    def _choose(self, q_TKGD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> Choice:
        groups = _rows_of(batch).groups
        if len(groups) == 1:
            return self._choose_in(groups[0], q_TKGD, shape)
        shape_k = (*q_TKGD.shape[:3], self._retrieval.top_k)
        whole = Choice(*(torch.empty(shape_k, dtype=dtype, device=q_TKGD.device) for dtype in _CHOICE_DTYPES))
        for group in groups:
            where, part = group.rows, self._choose_in(group, q_TKGD[group.rows], shape)
            whole.block[where], whole.is_there[where], whole.num_slots[where] = (
                part.block, part.is_there, part.num_slots,
            )  # fmt: skip
        return whole

    def _choose_in(self, group: RowGroup, q_TKGD: torch.Tensor, shape: AttentionShape) -> Choice:
        landmarks = self._keys.read(shape.layer_idx, group.pages)
        return choose_blocks(q_TKGD, landmarks, group.block_T, group.run_T, self._retrieval, self._turn)

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
        if self._retrieval.skip_below > 0:
            is_skipped = torch.exp(scores_TKGk - total_TKG[..., None]).sum(-1) < self._retrieval.skip_below
            total_TKG = torch.where(is_skipped, own_TKG, total_TKG)
            is_seen = is_seen & ~is_skipped[..., None]
        gates_TKGk = torch.exp(scores_TKGk - total_TKG[..., None])
        out_TKGD = own_THD.unflatten(1, q_TKGD.shape[1:3]) * torch.exp(own_TKG - total_TKG)[..., None]
        self._add_blocks(out_TKGD, q_TKGkD, page_TKGk, gates_TKGk, is_seen, shape, batch)
        return out_TKGD.flatten(1, 2)

    def _add_blocks(
        self,
        out_TKGD: torch.Tensor,
        q_TKGkD: torch.Tensor,
        page_TKGk: torch.Tensor,
        gates_TKGk: torch.Tensor,
        is_seen: torch.Tensor,
        shape: AttentionShape,
        batch: PackedBatch,
    ) -> None:
        """Add what rows see of their blocks, those that see the same block of a KV head after each other."""
        num_kv_heads, num_ranks = shape.num_kv_heads, page_TKGk.shape[3]
        place_S = is_seen.flatten().nonzero()[:, 0]
        kv_head_S = place_S // (shape.num_heads // num_kv_heads * num_ranks) % num_kv_heads
        key_S, order = (page_TKGk.flatten()[place_S] * num_kv_heads + kv_head_S).sort()
        place_S = place_S[order]
        key_B, counts_B = key_S.unique_consecutive(return_counts=True)
        border_B1 = torch.cat((counts_B.new_zeros(1), counts_B.cumsum(0))).int()
        q_SD = q_TKGkD.flatten(0, 3)[place_S]
        seen = HeadPages(border_B1, key_B // num_kv_heads, key_B % num_kv_heads)
        seen_SD = self._see_whole(q_SD, seen, shape, batch)
        seen_SD = seen_SD * gates_TKGk.flatten()[place_S, None]
        if not seen_SD.is_cuda:
            out_TKGD.view(-1, shape.head_dim).index_add_(0, place_S // num_ranks, seen_SD)
            return
        # There index_add_ adds in any order: the same step would give another answer the next time.
        terms_TKGkD = seen_SD.new_zeros(q_TKGkD.shape)
        terms_TKGkD.view(-1, shape.head_dim)[place_S] = seen_SD
        out_TKGD += terms_TKGkD.sum(3)

    def _see_whole(
        self, q_SD: torch.Tensor, seen: HeadPages, shape: AttentionShape, batch: PackedBatch
    ) -> torch.Tensor:
        """Attention ``[S, D]`` of each segment's rows to a block of one KV head; blocks are in ascending order."""
        seen_SD = self._see_here(q_SD, seen, shape, batch)
        if self._tiers is not None:
            self._tiers.end_layer(shape.layer_idx)
        return seen_SD

    def _see_here(self, q_SD: torch.Tensor, seen: HeadPages, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        """``_see_whole``, part of what a layer looks at."""
        if self._tiers is None:
            return self.inner.attend_pages(q_SD, shape, seen, batch.pool)
        pages, counts = (x.cpu() for x in seen.pages_B.unique_consecutive(return_counts=True))
        ends, outs = [0, *counts.cumsum(0).tolist()], []
        for part, frames in self._tiers.look_at(shape.layer_idx, pages):
            blocks = slice(ends[part.start], ends[part.stop])
            frame_B = frames.repeat_interleave(counts[part]).to(seen.pages_B.device)
            borders = seen.cu_seqlens_B1[blocks.start : blocks.stop + 1]
            own = HeadPages(borders - borders[0], frame_B, seen.kv_heads_B[blocks])
            outs.append(self.inner.attend_pages(q_SD[int(borders[0]) : int(borders[-1])], shape, own, batch.pool))
        return torch.cat(outs) if outs else q_SD.float()


_CHOICE_DTYPES = (torch.int64, torch.bool, torch.int64)


def _rows_of(batch: PackedBatch) -> LandmarkRows:
    assert batch.landmark is not None, "a batch for landmark attention is made by insert_landmarks"
    return batch.landmark
