"""SF-Attn, the attention of SinkLoRA (arXiv 2406.05678, section 3): long-context tuning at the price of short contexts.

Tokens attend within groups of their document. As in LongLoRA's shifted sparse attention (arXiv 2309.12307), groups of
half of the heads are shifted by half a group, so that neighbouring groups learn of each other; SF-Attn takes the shift
of a share of these heads back, and lets every query see its document's first tokens, the attention sinks. Inference is
dense. LongLoRA shifts by a rotation, which puts a document's end and its beginning into one group; here the first and
the last half-group are groups of their own, so that nothing is seen of the future. Groups are cut from each document's
beginning: where it lies in a packed sequence makes no difference.

Two calls of ``sequence_parallel_attention``, whose documents are the groups, and on top of each the sinks, merged by
log-sum-exp:

    every rank   the sinks' K and V of all long documents: an all-reduce of a few rows
    plain heads  attention within groups | merge the sinks
    shifted      attention within groups | merge the sinks

The graph is the same on every rank, whatever it holds: their collectives meet in the backward, too.

Left out: sliding windows, which would hide at inference the sinks that training showed.

Legend: S this rank's tokens, N sinks, H query heads, K KV heads, G query heads per KV head, D head dim.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from longctx.training.attention_choice import check_sf
from longctx.training.config import SF_GROUP_SIZE, TrainAttentionConfig
from longctx.training.shifted_groups import cut_groups, split_heads
from parallel.attention import sequence_parallel_attention
from parallel.layout import Layout, make_layout
from parallel.tile_attention import accumulator_dtype

CHUNK_ROWS = 4096  # whose float32 intermediates exist at one time


class SFAttention:
    """Shifted sparse attention with sinks.

    Args:
        config: ``group_size``, ``sink_tokens`` and ``returned_heads``.

    Raises:
        ConfigError: if the sinks do not fit into half a group.
    """

    def __init__(self, config: TrainAttentionConfig) -> None:
        check_sf(config)
        self.group_size, self.num_sinks = config.group_size or SF_GROUP_SIZE, config.sink_tokens
        self.returned_heads = config.returned_heads

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        group: dist.ProcessGroup | None,
        cu_seqlens: Sequence[int] | None,
        causal: bool = True,
        window: int | None = None,
        layout: str = "zigzag",
        scale: float | None = None,
        **choices: Any,
    ) -> torch.Tensor:
        """What ``sequence_parallel_attention`` is called with, and what it returns. Collective.

        Raises:
            ValueError: for attention that is not causal or has a window, for a batch, and without ``cu_seqlens``.
        """
        if not causal or window is not None:
            raise ValueError(
                f"causal={causal}, window={window} are not allowed: attention sf takes causal models without windows"
            )
        if cu_seqlens is None or q.shape[0] != 1:
            raise ValueError("attention sf takes one sequence, with the cu_seqlens of its documents")
        documents, scale = tuple(map(int, cu_seqlens)), scale or q.shape[-1] ** -0.5
        sets = split_heads(self.group_size, self.returned_heads, q.shape[2], k.shape[2])
        first_size = min(each.first_size for each in sets)
        long = [(start, stop) for start, stop in pairwise(documents) if self.num_sinks and stop - start > first_size]
        own = _Rows(group, layout, documents)
        sinks = _gather_sinks(k, v, [start for start, _ in long], self.num_sinks, own, group) if long else None
        outputs = []
        for heads in sets:
            parts = q[:, :, heads.queries], k[:, :, heads.keys], v[:, :, heads.keys]
            out, lse = sequence_parallel_attention(
                *parts,
                group=group,
                cu_seqlens=cut_groups(documents, heads.first_size, self.group_size),
                layout=layout,
                layout_cu_seqlens=documents,
                scale=scale,
                return_lse=True,
                **choices,
            )
            if sinks is not None:
                rows = [own.of(min(start + heads.first_size, stop), stop) for start, stop in long]
                seen = (each[:, heads.keys] for each in sinks)
                out = _MergeSinks.apply(parts[0][0], *seen, out[0], lse[0].transpose(0, 1), rows, scale)[None]
            outputs.append(out)
        return torch.cat(outputs, 2)


class _Rows:
    """Where this rank holds what: a document's tokens lie together in every layout, in order."""

    def __init__(self, group: dist.ProcessGroup | None, layout: str, documents: tuple[int, ...]) -> None:
        self._spans = _make_layout(layout, dist.get_world_size(group), documents)[dist.get_rank(group)]
        assert all(a.stop <= b.start for a, b in pairwise(self._spans))

    def before(self, position: int) -> int:
        """Rows of tokens below a global position."""
        return sum(len(range(span.start, min(span.stop, position), span.step)) for span in self._spans)

    def holds(self, position: int) -> bool:
        """Whether this rank has the token at a global position."""
        return self.before(position + 1) > self.before(position)

    def of(self, start: int, stop: int) -> slice:
        """Rows of the tokens ``[start, stop)``."""
        return slice(self.before(start), self.before(stop))


@lru_cache(maxsize=8)  # asked by every layer
def _make_layout(name: str, world_size: int, documents: tuple[int, ...]) -> Layout:
    return make_layout(name, documents[-1], world_size, cu_seqlens=documents)


def _gather_sinks(
    k: torch.Tensor,
    v: torch.Tensor,
    starts: Sequence[int],
    num_sinks: int,
    own: _Rows,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V ``[N, K, D]`` of the first tokens of documents that begin at ``starts``, on every rank."""
    positions = [start + idx for start in starts for idx in range(num_sinks)]
    held = [(own.before(position), slot) for slot, position in enumerate(positions) if own.holds(position)]
    places = torch.tensor(held, dtype=torch.int64, device=k.device).view(-1, 2)
    return _GatherRows.apply(k[0], v[0], places[:, 0], places[:, 1], len(positions), group)


class _GatherRows(torch.autograd.Function):
    """Every rank's ``rows`` of k and v in one tensor each, at ``slots``; each slot is one rank's."""

    @staticmethod
    def forward(
        ctx: Any,
        k_SKD: torch.Tensor,
        v_SKD: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
        num_slots: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(rows, slots)
        ctx.group, ctx.shape, ctx.dtype = group, k_SKD.shape, k_SKD.dtype
        dtype = accumulator_dtype(k_SKD.dtype)
        whole = torch.zeros(2, num_slots, *k_SKD.shape[1:], dtype=dtype, device=k_SKD.device)
        whole[:, slots] = torch.stack([k_SKD[rows], v_SKD[rows]]).to(dtype)
        dist.all_reduce(whole, group=group)
        return whole[0], whole[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, slots = ctx.saved_tensors
        gradients = torch.stack(grad_outputs)
        dist.all_reduce(gradients, group=ctx.group)
        dk, dv = gradients.new_zeros(2, *ctx.shape, dtype=ctx.dtype)
        dk[rows], dv[rows] = gradients[:, slots].to(ctx.dtype)
        return dk, dv, None, None, None, None


class _MergeSinks(torch.autograd.Function):
    """Attention that has seen keys of a group, and now sees sinks, too.

    With P over both, out = P_group out_group + P_sinks V, and the gradients of a softmax over both: that by a score is
    P (dP - delta), that by the group's log-sum-exp the same with the group's output as its value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_SHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        out_SHD: torch.Tensor,
        lse_SH: torch.Tensor,
        rows_of_documents: list[slice],
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q_SHD, k_NKD, v_NKD, out_SHD, lse_SH)
        ctx.rows_of_documents, ctx.scale = rows_of_documents, scale
        merged_SHD = out_SHD.clone()
        for rows, sinks in _chunks(rows_of_documents, len(k_NKD)):
            p_SKGN, p_group_SH = _weigh(q_SHD[rows], k_NKD[sinks], lse_SH[rows], scale)
            seen_SHD = torch.einsum("skgn,nkd->skgd", p_SKGN, v_NKD[sinks]).flatten(1, 2)
            merged_SHD[rows] = p_group_SH[..., None] * out_SHD[rows] + seen_SHD
        return merged_SHD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_SHD, k_NKD, v_NKD, out_SHD, lse_SH = ctx.saved_tensors
        (dmerged_SHD,) = grad_outputs
        dq, dout, dlse = torch.zeros_like(q_SHD), dmerged_SHD.clone(), torch.zeros_like(lse_SH)
        dk, dv = torch.zeros_like(k_NKD), torch.zeros_like(v_NKD)
        for rows, sinks in _chunks(ctx.rows_of_documents, len(k_NKD)):
            q_SKGD = _grouped(q_SHD[rows], k_NKD)
            p_SKGN, p_group_SH = _weigh(q_SHD[rows], k_NKD[sinks], lse_SH[rows], ctx.scale)
            dmerged = dmerged_SHD[rows].to(lse_SH.dtype)
            d_SKGD = _grouped(dmerged, k_NKD)
            dp_SKGN = torch.einsum("skgd,nkd->skgn", d_SKGD, v_NKD[sinks])
            dp_group_SH = (dmerged * out_SHD[rows]).sum(-1)
            delta_SH = p_group_SH * dp_group_SH + (p_SKGN * dp_SKGN).sum(-1).flatten(1)
            ds_SKGN = p_SKGN * (dp_SKGN - delta_SH.view(dp_SKGN.shape[:3])[..., None]) * ctx.scale
            dq[rows] = torch.einsum("skgn,nkd->skgd", ds_SKGN, k_NKD[sinks]).flatten(1, 2).to(dq.dtype)
            dk[sinks] += torch.einsum("skgn,skgd->nkd", ds_SKGN, q_SKGD)
            dv[sinks] += torch.einsum("skgn,skgd->nkd", p_SKGN, d_SKGD)
            dout[rows] = (p_group_SH[..., None] * dmerged).to(dout.dtype)
            dlse[rows] = p_group_SH * (dp_group_SH - delta_SH)
        return dq, dk, dv, dout, dlse, None, None


def _chunks(rows_of_documents: Sequence[slice], num_sinks: int) -> Iterator[tuple[slice, slice]]:
    """Rows, at most ``CHUNK_ROWS`` at a time, and their document's sinks among the ``num_sinks`` of all."""
    per_document = num_sinks // len(rows_of_documents)
    for idx, rows in enumerate(rows_of_documents):
        for row in range(rows.start, rows.stop, CHUNK_ROWS):
            sinks = slice(idx * per_document, (idx + 1) * per_document)
            yield slice(row, min(row + CHUNK_ROWS, rows.stop)), sinks


def _grouped(x_SHD: torch.Tensor, like_NKD: torch.Tensor) -> torch.Tensor:
    """``[S, K, G, D]`` in the dtype of the sinks."""
    return x_SHD.to(like_NKD.dtype).unflatten(1, (like_NKD.shape[1], -1))


def _weigh(
    q_SHD: torch.Tensor, k_NKD: torch.Tensor, lse_SH: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over group and sinks: of each sink ``[S, K, G, N]``, and of the group as a whole ``[S, H]``."""
    scores_SKGN = torch.einsum("skgd,nkd->skgn", _grouped(q_SHD, k_NKD), k_NKD) * scale
    total_SH = torch.logaddexp(lse_SH, scores_SKGN.logsumexp(-1).flatten(1))
    p_SKGN = torch.exp(scores_SKGN - total_SH.view(scores_SKGN.shape[:3])[..., None])
    return p_SKGN, torch.exp(lse_SH - total_SH)
