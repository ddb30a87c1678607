"""Attention over tensors that the ranks share, tile by tile, forward and backward (``sequence_parallel_attention``).

The executor is ``parallel/exchange.py``; this says what is computed on what has arrived.
"""

import torch

from parallel.carrier import Carrier
from parallel.exchange import Exchange, ForwardExchange, Held, Key, allocate_rows
from parallel.plan import Heads, Plan, Return, Work
from parallel.tile_attention import TileKernel, accumulator_dtype, attend_tile_, differentiate_tile_, split_heads


class Forward(ForwardExchange):
    """Attention over tensors, tile by tile."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        carrier: Carrier,
        kernel: TileKernel,
        q_BSHD: torch.Tensor,
        k_BLKD: torch.Tensor,
        v_BLKD: torch.Tensor,
        scale: float,
        *,
        has_backward: bool = True,
    ) -> None:
        self._kernel, self._scale = kernel, scale
        own = {"q": (q_BSHD,), "kv": (k_BLKD, v_BLKD)}
        super().__init__(plan, rank, carrier, own, keeps=plan.keeps and has_backward)

    def compute(self, work: Work, q: Held, kv: Held) -> None:
        sums = self.sums_for(work, "q")
        for tile in work.tiles:
            (q_BSHD,) = q.cut(tile.q_start, tile.q_stop)
            k_BLKD, v_BLKD = kv.cut(tile.kv_start, tile.kv_stop)
            out_BSHD, lse_BSH = sums.cut(tile.q_start, tile.q_stop)
            for hs, ks in split_heads(work.heads, self.plan.problem.group_size):
                attend_tile_(
                    self._kernel,
                    tile,
                    q_BSHD[:, :, hs],
                    k_BLKD[:, :, ks],
                    v_BLKD[:, :, ks],
                    out_BSHD[:, :, hs],
                    lse_BSH[:, :, hs],
                    self._scale,
                )


class Backward(Exchange):
    """Gradients; afterwards ``dq``, ``dk`` and ``dv`` are this rank's, not yet rounded. ``kept``: the forward's."""

    backward = True

    def __init__(
        self,
        plan: Plan,
        rank: int,
        carrier: Carrier,
        kernel: TileKernel,
        q_BSHD: torch.Tensor,
        k_BLKD: torch.Tensor,
        v_BLKD: torch.Tensor,
        dout_BSHD: torch.Tensor,
        lse_BSH: torch.Tensor,
        delta_BSH: torch.Tensor,
        scale: float,
        kept: dict[Key, Held],
    ) -> None:
        self._kernel, self._scale = kernel, scale
        self._kept = kept
        self._dtype = accumulator_dtype(q_BSHD.dtype)
        own = {"q": (lse_BSH, delta_BSH, q_BSHD, dout_BSHD), "kv": (k_BLKD, v_BLKD)}
        self._templates = {"q": (q_BSHD,), "kv": (k_BLKD, v_BLKD)}
        super().__init__(plan, rank, carrier, own)
        self._held |= {key: held for key, held in kept.items() if key[0] == "kv"}
        (self.dq,) = self.new_sums("q", q_BSHD.shape[1], plan.problem.all_heads)
        self.dk, self.dv = self.new_sums("kv", k_BLKD.shape[1], plan.problem.all_heads)

    def travelling(self, kind: str, held: Held) -> Held:
        if kind == "q" and self.plan.keeps:
            lse, delta, _, dout = held.tensors
            return Held(held.rows, (lse, delta, dout))
        return held

    def arrived(self, key: Key, held: Held) -> Held:
        if key[0] == "q" and self.plan.keeps:
            lse, delta, dout = held.tensors
            return Held(held.rows, (lse, delta, *self._kept[key].tensors, dout))
        return held

    def compute(self, work: Work, q: Held, kv: Held) -> None:
        q_sums, kv_sums = self.sums_for(work, "q"), self.sums_for(work, "kv")
        for tile in work.tiles:
            lse, delta, q_BSHD, dout = q.cut(tile.q_start, tile.q_stop)
            k_BLKD, v_BLKD = kv.cut(tile.kv_start, tile.kv_stop)
            (dq,) = q_sums.cut(tile.q_start, tile.q_stop)
            dk, dv = kv_sums.cut(tile.kv_start, tile.kv_stop)
            for hs, ks in split_heads(work.heads, self.plan.problem.group_size):
                differentiate_tile_(
                    self._kernel,
                    tile,
                    dout[:, :, hs],
                    q_BSHD[:, :, hs],
                    k_BLKD[:, :, ks],
                    v_BLKD[:, :, ks],
                    lse[:, :, hs],
                    delta[:, :, hs],
                    dq[:, :, hs],
                    dk[:, :, ks],
                    dv[:, :, ks],
                    self._scale,
                )

    def add(self, back: Return, held: Held) -> None:
        own = self._cut_heads(self.own_sums(back.kind), back.kind, back.heads)
        for start, stop in back.rows:
            for mine, theirs in zip(own.cut(start, stop), held.cut(start, stop), strict=True):
                mine += theirs

    def own_sums(self, kind: str) -> Held:
        tensors = (self.dq,) if kind == "q" else (self.dk, self.dv)
        return Held(((0, tensors[0].shape[1]),), tensors)

    def new_sums(self, kind: str, num_rows: int, heads: Heads) -> tuple[torch.Tensor, ...]:
        first, stop = heads if kind == "q" else self.plan.problem.kv_heads(heads)
        templates = [tensor[:, :0, first:stop].to(self._dtype) for tensor in self._templates[kind]]
        return tuple(tensor.zero_() for tensor in allocate_rows(templates, num_rows))
