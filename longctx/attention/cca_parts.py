"""CCA attention put together from kernels of dense attention, by their log-sum-exp.

Queries that lie g apart see one core more each: folded into the head dimension, the cores' part is plain causal
attention. Tokens as they are are a window of s and, for the p-th query behind a group's border, p - 1 tokens more,
which are small triangles.

Legend: B batch, S tokens, g tokens of a group, H query heads, K KV heads, G = H / K, D head dim, T rows of g queries, p
and j a query and a key behind a border.
"""

from typing import Any

import torch

from parallel.mask import Tile
from parallel.merge import merge_partial_
from parallel.tile_attention import (
    TileKernel,
    accumulator_dtype,
    attend_tile_,
    choose_kernel,
    differentiate_tile_,
)


class AttendInParts(torch.autograd.Function):
    """Arguments and result of ``longctx.attention.cca.attend_cores``, on any device."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, core_k: Any, core_v: Any, *sizes: Any) -> torch.Tensor:
        out, lse = _Parts(q, k, v, core_k, core_v, *sizes).forward()
        ctx.save_for_backward(q, k, v, core_k, core_v, out, lse)
        ctx.sizes = sizes
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        *inputs, out, lse = ctx.saved_tensors
        computed = _Parts(*inputs, *ctx.sizes).backward(gradients[0], out, lse)
        return *(x.to(given.dtype) for x, given in zip(computed, inputs, strict=True)), None, None, None


class _Parts:
    """Three attentions whose results are merged: cores, window, and what lies between a window and a group's border."""

    def __init__(
        self, q: Any, k: Any, v: Any, core_k: Any, core_v: Any, group_size: int, window: int, scale: float
    ) -> None:
        self._q, self._k, self._v, self._core_k, self._core_v = q, k, v, core_k, core_v
        self._group_size, self._window, self._scale = group_size, window, scale
        self._dtype = accumulator_dtype(q.dtype)
        self._kernel: TileKernel = choose_kernel(q.device, q.dtype, q.shape[3])
        num_tokens = q.shape[1]
        self._near = Tile(0, num_tokens, 0, num_tokens, low=1 - window, high=0)
        self._first = min(window - 1 + group_size, num_tokens)  # query that sees a core
        self._num_rows = (num_tokens - self._first) // group_size  # of group_size queries
        self._folded = slice(self._first, self._first + self._num_rows * group_size)
        self._causal = Tile(0, self._num_rows, 0, self._num_rows, high=0)
        self._rest = slice(self._folded.stop, num_tokens)
        self._between = _Between(num_tokens, group_size, window, q.device)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, S, H, D]`` and log-sum-exp ``[B, S, H]``."""
        q, kernel, scale = self._q, self._kernel, self._scale
        out = torch.zeros(q.shape, dtype=self._dtype, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=self._dtype, device=q.device)
        attend_tile_(kernel, self._near, q, self._k, self._v, out, lse, scale)
        if self._num_rows:
            folded, columns = self._fold(q), slice(0, self._num_rows)
            part_out = torch.zeros(folded.shape, dtype=self._dtype, device=q.device)
            part_lse = torch.full(folded.shape[:3], float("-inf"), dtype=self._dtype, device=q.device)
            cores = self._core_k[:, columns], self._core_v[:, columns]
            attend_tile_(kernel, self._causal, folded, *cores, part_out, part_lse, scale)
            part_lse = self._unfold(part_lse[..., None])[..., 0]
            merge_partial_(out[:, self._folded], lse[:, self._folded], self._unfold(part_out), part_lse)
        if tile := self._rest_tile:
            rows, columns = self._rest, slice(0, tile.kv_stop)
            cores = self._core_k[:, columns], self._core_v[:, columns]
            attend_tile_(kernel, tile, q[:, rows], *cores, out[:, rows], lse[:, rows], scale)
        if len(self._between.rows):
            rows = self._between.rows
            taken = out[:, rows], lse[:, rows]
            merge_partial_(*taken, *self._between.attend(q, self._k, self._v, scale, self._dtype))
            out[:, rows], lse[:, rows] = taken
        return out, lse

    def backward(self, dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of q, k, v and the cores' keys and values."""
        q, kernel, scale = self._q, self._kernel, self._scale
        delta = (dout.to(self._dtype) * out).sum(-1)
        dq, dk, dv, dcore_k, dcore_v = (
            torch.zeros(x.shape, dtype=self._dtype, device=q.device)
            for x in (q, self._k, self._v, self._core_k, self._core_v)
        )
        differentiate_tile_(kernel, self._near, dout, q, self._k, self._v, lse, delta, dq, dk, dv, scale)
        if self._num_rows:
            columns = slice(0, self._num_rows)
            cores = self._core_k[:, columns], self._core_v[:, columns]
            folded = self._fold(q)
            folded_lse, folded_delta = (self._fold(x[..., None])[..., 0] for x in (lse, delta))
            part = torch.zeros(folded.shape, dtype=self._dtype, device=q.device)
            targets = part, dcore_k[:, columns], dcore_v[:, columns]
            given = self._fold(dout), folded, *cores, folded_lse, folded_delta
            differentiate_tile_(kernel, self._causal, *given, *targets, scale)
            dq[:, self._folded] += self._unfold(part)
        if tile := self._rest_tile:
            rows, columns = self._rest, slice(0, tile.kv_stop)
            given = dout[:, rows], q[:, rows], self._core_k[:, columns], self._core_v[:, columns]
            targets = dq[:, rows], dcore_k[:, columns], dcore_v[:, columns]
            differentiate_tile_(kernel, tile, *given, lse[:, rows], delta[:, rows], *targets, scale)
        if len(self._between.rows):
            self._between.differentiate(dout, q, self._k, self._v, lse, delta, (dq, dk, dv), scale)
        return dq, dk, dv, dcore_k, dcore_v

    @property
    def _rest_tile(self) -> Tile | None:
        """Queries behind the last whole row; all see the same cores."""
        num = self._rest.stop - self._rest.start
        return Tile(0, num, 0, self._num_rows + 1) if num else None

    def _fold(self, x_BSHD: torch.Tensor) -> torch.Tensor:
        """``[B, T, K * g * G, D]``: a KV head's query heads of a row of queries lie together."""
        rows = x_BSHD[:, self._folded].unflatten(1, (-1, self._group_size)).unflatten(3, (self._k.shape[2], -1))
        return rows.transpose(2, 3).flatten(2, 4)

    def _unfold(self, x_BTFD: torch.Tensor) -> torch.Tensor:
        rows = x_BTFD.unflatten(2, (self._k.shape[2], self._group_size, -1))
        return rows.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class _Between:
    """The tokens between a group's border and the window: none for the border's own query, one more for each behind it.

    ``rows`` are the queries that see some, ``[n]``.
    """

    def __init__(self, num_tokens: int, group_size: int, window: int, device: torch.device) -> None:
        self._size = group_size - 1
        first = torch.arange(0, max(0, num_tokens - window), group_size, device=device)  # token of each group
        inner = torch.arange(1, group_size, device=device)
        self.rows = (first[:, None] + (window - 1 + inner)).flatten()
        self.rows = self.rows[self.rows < num_tokens]
        self._columns = (first[:, None] + (inner - 1)).flatten().clamp_max(num_tokens - 1)
        self._is_hidden = torch.ones(self._size, self._size, dtype=torch.bool, device=device).triu(1)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output ``[B, n, H, D]`` and log-sum-exp ``[B, n, H]``."""
        scores_BTKGpj, v_BTKjD, _, _ = self._score(q, k, v, scale, dtype)
        lse = scores_BTKGpj.logsumexp(-1)
        out = torch.exp(scores_BTKGpj - lse[..., None]) @ v_BTKjD[:, :, :, None]
        return self._to_rows(out), self._to_rows(lse[..., None])[..., 0]

    def differentiate(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scale: float,
    ) -> None:
        """Add the gradients to dq, dk and dv."""
        dq, dk, dv = targets
        scores_BTKGpj, v_BTKjD, k_BTKjD, q_BTKGpD = self._score(q, k, v, scale, dq.dtype)
        dout_BTKGpD, lse_BTKGp1, delta_BTKGp1 = (
            self._take_queries(x, k.shape[2], dq.dtype) for x in (dout, lse[..., None], delta[..., None])
        )
        weights = torch.exp(scores_BTKGpj - lse_BTKGp1)
        dscores = weights * (dout_BTKGpD @ v_BTKjD[:, :, :, None].mT - delta_BTKGp1) * scale
        dq.index_add_(1, self.rows, self._to_rows(dscores @ k_BTKjD[:, :, :, None]))
        for target, left, right in ((dk, dscores, q_BTKGpD), (dv, weights, dout_BTKGpD)):
            summed_BTKjD = (left.mT @ right).sum(3)
            target.index_add_(1, self._columns, summed_BTKjD.transpose(2, 3).flatten(1, 2))

    def _score(self, q: Any, k: Any, v: Any, scale: float, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        k_BTKjD, v_BTKjD = (
            x[:, self._columns].to(dtype).unflatten(1, (-1, self._size)).transpose(2, 3) for x in (k, v)
        )
        q_BTKGpD = self._take_queries(q, k.shape[2], dtype)
        scores = (q_BTKGpD @ k_BTKjD[:, :, :, None].mT) * scale
        return scores.masked_fill(self._is_hidden, float("-inf")), v_BTKjD, k_BTKjD, q_BTKGpD

    def _take_queries(self, x_BSHD: torch.Tensor, num_kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
        """``[B, T, K, G, p, D]``; behind the last query zeros, whose gradients are none."""
        rows = x_BSHD[:, self.rows].to(dtype)
        missing = len(self._columns) - len(self.rows)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, missing))
        return rows.unflatten(2, (num_kv_heads, -1)).unflatten(1, (-1, self._size)).permute(0, 1, 3, 4, 2, 5)

    def _to_rows(self, x_BTKGpD: torch.Tensor) -> torch.Tensor:
        return x_BTKGpD.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, : len(self.rows)]
