"""CCA attention in training, over a sequence that several ranks share.

No rank sees all keys: what it needs of far tokens are their cores, a group's tokens in one. Groups are pooled wherever
their tokens lie; the window goes through ``sequence_parallel_attention``, reaching back to a group's border, and the
cores are merged into its result by log-sum-exp.

    every rank  the queries of the groups' last tokens | softmax of each group: largest score, sum | cores
                attention within the window | merge the cores

Each of the first line is an all-reduce of a few numbers or one row a group; in the backward likewise. The graph is the
same on every rank, whatever it holds. One rank alone on a GPU runs Triton's kernel (``longctx/attention/cca.py``).

Legend: S this rank's tokens, T those of them in groups, N groups that some query sees as cores, H query heads, K KV
heads, G = H / K, D head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from longctx.attention.cca import cca_attention
from longctx.training.config import TrainAttentionConfig
from longctx.training.core_merge import MergeCores
from longctx.training.shared_rows import AddUp, Rows, check_call, find_rows
from parallel.attention import sequence_parallel_attention
from parallel.tile_attention import accumulator_dtype

Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``(x [n, heads, D], positions [n] or [n, heads], lengths of the documents [n])`` to x rotated."""


class CCAAttention:
    """Attention of one model's layers.

    Args:
        config: settled; ``group_size``, ``window``, ``core_position`` and ``head_pooling``.
    """

    def __init__(self, config: TrainAttentionConfig) -> None:
        assert config.group_size and config.window and config.core_position and config.head_pooling
        self.group_size, self.window = config.group_size, config.window
        self.core_position, self.head_pooling = config.core_position, config.head_pooling
        self._groups: tuple[Rows, _Groups] | None = None  # of the sequence that is being run

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        group: dist.ProcessGroup | None,
        cu_seqlens: Sequence[int],
        rotate: Rotate,
        causal: bool = True,
        window: int | None = None,
        layout: str = "zigzag",
        scale: float | None = None,
        **choices: Any,
    ) -> torch.Tensor:
        """What ``sequence_parallel_attention`` is called with, and what it returns. Collective.

        Args:
            q, k, v: this rank's, ``[1, seq_local, heads, head_dim]``, q and k before RoPE.
            rotate: turns them.
            group, cu_seqlens, layout, scale, choices: see ``sequence_parallel_attention``.
            causal, window: others than a causal model's without windows are refused.

        Raises:
            ValueError: for attention that is not causal or has a window of the model's, or a batch.
        """
        check_call("CCA", q, causal=causal, window=window)
        factor: float = q.shape[-1] ** -0.5 if scale is None else scale
        if dist.get_world_size(group) == 1 and q.device.type == "cuda":
            return self._attend_alone(q, k, v, cu_seqlens, rotate, factor)
        rows = find_rows(layout, cu_seqlens, group)
        groups = self._find_groups(rows, cu_seqlens)
        turned_q, turned_k = (rotate(x[0], groups.token_positions_S, rows.lengths_S) for x in (q, k))
        out, lse = sequence_parallel_attention(
            turned_q[None],
            turned_k[None],
            v,
            group=group,
            cu_seqlens=cu_seqlens,
            window=self.window,
            window_group=self.group_size,
            layout=layout,
            scale=factor,
            return_lse=True,
            **choices,
        )
        if not groups.num:
            return out
        core_k, core_v, positions = self._pool(q[0], k[0], v[0], groups, group, factor)
        core_k = rotate(core_k, positions, groups.lengths_N)
        lse_SH = lse[0].transpose(0, 1)
        return MergeCores.apply(
            turned_q, core_k, core_v, out[0], lse_SH, groups.first_core_S, groups.num_cores_S, factor
        )[None]

    def _find_groups(self, rows: Rows, documents: Sequence[int]) -> "_Groups":
        if self._groups is None or self._groups[0] is not rows:
            self._groups = rows, _find_groups(rows, documents, self.group_size, self.window)
        return self._groups[1]

    def _attend_alone(
        self, q: Any, k: Any, v: Any, cu_seqlens: Sequence[int], rotate: Rotate, scale: float
    ) -> torch.Tensor:
        parts = []
        for start, stop in pairwise(cu_seqlens):
            if start == stop:
                continue
            own = (x[:, start:stop] for x in (q, k, v))
            rope = partial(_rotate_document, rotate, stop - start)
            sizes = {"group_size": self.group_size, "window": self.window, "scale": scale}
            choices = {"core_position": self.core_position, "head_pooling": self.head_pooling}
            parts.append(cca_attention(*own, rope=rope, **sizes, **choices))
        return torch.cat(parts, 1)

    def _pool(
        self,
        q_SHD: torch.Tensor,
        k_SKD: torch.Tensor,
        v_SKD: torch.Tensor,
        groups: "_Groups",
        group: dist.ProcessGroup | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cores' keys (before RoPE) and values ``[N, K, D]`` and positions ``[N]`` or ``[N, K]``, on every rank."""
        device, dtype = q_SHD.device, accumulator_dtype(q_SHD.dtype)
        last_rows, last_slots, tokens_T, slots_T = (
            x.to(device) for x in (groups.last_rows, groups.last_slots, groups.rows_T, groups.slots_T)
        )
        queries = q_SHD[last_rows].to(dtype).unflatten(1, (k_SKD.shape[1], -1))
        if self.head_pooling == "query":
            queries = queries.mean(2, keepdim=True)
        q_NKGD = queries.new_zeros(groups.num, *queries.shape[1:]).index_copy(0, last_slots, queries)
        q_NKGD = AddUp.apply(q_NKGD, group)
        k_TKD, v_TKD = (x[tokens_T].to(dtype) for x in (k_SKD, v_SKD))
        scores_TKG = (q_NKGD[slots_T] @ k_TKD[..., None])[..., 0] * scale
        weights_TK = _softmax_in_groups(scores_TKG, slots_T, groups.num, group).mean(2)
        parts = torch.cat([weights_TK[..., None] * k_TKD, weights_TK[..., None] * v_TKD], 2)
        cores = AddUp.apply(parts.new_zeros(groups.num, *parts.shape[1:]).index_add(0, slots_T, parts), group)
        core_k, core_v = (x.to(k_SKD.dtype) for x in cores.chunk(2, 2))
        begins_N = groups.begins_N.to(device, dtype)
        if self.core_position != "mean":
            return core_k, core_v, begins_N + (self.group_size - 1) * (1.0 if self.core_position == "last" else 0.5)
        offsets_T = groups.token_positions_S.to(device)[tokens_T].to(dtype) - begins_N[slots_T]
        means = weights_TK.new_zeros(groups.num, k_SKD.shape[1])
        means.index_add_(0, slots_T, weights_TK.detach() * offsets_T[:, None])
        dist.all_reduce(means, group=group)
        return core_k, core_v, begins_N[:, None] + means


def _softmax_in_groups(
    scores_TKG: torch.Tensor, slots_T: torch.Tensor, num_groups: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Of each group's tokens, wherever they are."""
    shape = num_groups, *scores_TKG.shape[1:]
    index = slots_T[:, None, None].expand_as(scores_TKG)
    largest = scores_TKG.new_full(shape, float("-inf")).scatter_reduce(0, index, scores_TKG.detach(), "amax")
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    powers_TKG = torch.exp(scores_TKG - largest[slots_T])
    sums = AddUp.apply(powers_TKG.new_zeros(shape).index_add(0, slots_T, powers_TKG), group)
    return powers_TKG / sums[slots_T]


def _rotate_document(rotate: Rotate, length: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """For ``cca_attention``, which has positions ``[n, 1]`` or ``[1, n, heads]``."""
    lengths = torch.full((x.shape[1],), length, dtype=torch.int64)
    positions = positions[0] if positions.ndim == 3 else positions[:, 0]
    return rotate(x[0], positions, lengths)[None]


@dataclass(frozen=True, slots=True)
class _Groups:
    """Groups of all documents that some query sees as cores, and this rank's part in them; on the CPU."""

    num: int  # N, the same on all ranks
    begins_N: torch.Tensor  # position of each group's first token in its document
    lengths_N: torch.Tensor  # of each group's document
    rows_T: torch.Tensor  # this rank's tokens in groups
    slots_T: torch.Tensor  # and each one's group
    last_rows: torch.Tensor  # this rank's tokens that end a group
    last_slots: torch.Tensor
    token_positions_S: torch.Tensor  # of this rank's tokens, in their documents
    first_core_S: torch.Tensor  # the first core of each token's document
    num_cores_S: torch.Tensor  # that each token sees, from that on


def _find_groups(rows: Rows, documents: Sequence[int], group_size: int, window: int) -> _Groups:
    bounds = torch.tensor(documents)
    starts, lengths = bounds[:-1], bounds.diff()
    counts = (lengths - window).clamp_min(0) // group_size  # of groups that are seen as cores
    firsts = counts.cumsum(0) - counts
    document_N = torch.repeat_interleave(torch.arange(len(starts)), counts)
    begins_N = (torch.arange(len(document_N)) - firsts[document_N]) * group_size
    document_S = torch.bucketize(rows.positions_S, bounds[1:], right=True)
    positions_S = rows.positions_S - starts[document_S]
    is_grouped = positions_S // group_size < counts[document_S]
    slots_S = firsts[document_S] + positions_S // group_size
    rows_T = is_grouped.nonzero()[:, 0]
    last_rows = (is_grouped & (positions_S % group_size == group_size - 1)).nonzero()[:, 0]
    return _Groups(
        len(document_N),
        begins_N,
        lengths[document_N],
        rows_T,
        slots_S[rows_T],
        last_rows,
        slots_S[last_rows],
        positions_S,
        firsts[document_S],
        (positions_S + 1 - window).clamp_min(0) // group_size,
    )
