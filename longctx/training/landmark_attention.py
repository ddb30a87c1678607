"""Landmark attention in training, over a sequence that several ranks share.

A query sees every earlier token of its document: ranks gather all keys and values, and each computes its own queries'
rows. Of what was gathered nothing is kept: the backward gathers again.

    forward   gather K and V | own queries
    backward  gather K and V | own queries | add up dK and dV over the ranks

One rank alone on a GPU runs Triton's kernels (``longctx/attention/triton_landmark.py``), whose results a checkpointed
layer computes again; everywhere else they are kept as other attention's are (``parallel/kept_attention.py``).

Legend: S this rank's tokens, L those of the whole sequence, H query heads, K KV heads, G = H / K, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from longctx.attention.landmark import attend_with_torch, choose_landmark
from longctx.attention.landmark_blocks import Blocks, find_blocks
from longctx.attention.landmark_products import LandmarkProducts
from longctx.training.shared_rows import Rows, add_up_rows, check_call, find_rows, gather_rows
from parallel.kept_attention import current_kept_attention


class LandmarkAttention:
    """Attention of one model's layers."""

    def __init__(self) -> None:
        self._blocks: tuple[torch.Tensor, Blocks] | None = None  # of the sequence that is being run

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        group: dist.ProcessGroup | None,
        cu_seqlens: Sequence[int],
        is_landmark: torch.Tensor,
        causal: bool = True,
        window: int | None = None,
        layout: str = "zigzag",
        scale: float | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """What ``sequence_parallel_attention`` is called with, and what it returns. Collective.

        Args:
            q, k, v: this rank's, ``[1, seq_local, heads, head_dim]``, rotated.
            group: the ranks; None is the default group.
            cu_seqlens: ``[num_documents + 1]`` of the whole sequence.
            is_landmark: bool ``[seq]`` of the whole sequence, on the CPU.
            causal, window: others than a causal model's without windows are refused.
            layout: who holds which tokens.
            scale: of the scores; None is ``head_dim ** -0.5``.

        Raises:
            ValueError: for attention that is not causal or has a window, or a batch.
        """
        check_call("landmark", q, causal=causal, window=window)
        if self._blocks is None or self._blocks[0] is not is_landmark:
            self._blocks = is_landmark, find_blocks(is_landmark, cu_seqlens)
        blocks, factor = self._blocks[1], float(q.shape[-1] ** -0.5 if scale is None else scale)
        attend_alone = choose_landmark(q)
        if dist.get_world_size(group) == 1 and attend_alone is not attend_with_torch:
            return attend_alone(q, k, v, blocks, factor)
        kept = current_kept_attention()
        if kept is not None and kept.replays:
            return _SharedLandmark.apply(q[0], k[0], v[0], *kept.take())[0][None]
        run = _Run(blocks, find_rows(layout, cu_seqlens, group), group, factor)
        out_SHD, lse_KGS = _SharedLandmark.apply(q[0], k[0], v[0], run, None)
        if kept is not None:
            kept.keep(run, out_SHD, lse_KGS)
        return out_SHD[None]


@dataclass(frozen=True, slots=True)
class _Run:
    blocks: Blocks
    rows: Rows
    group: dist.ProcessGroup | None
    scale: float

    def open(self, q_SHD: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor) -> LandmarkProducts:
        """With every rank's keys and values. Collective."""
        whole = gather_rows(torch.stack([k_SKD, v_SKD], 1), self.rows, self.group)
        return LandmarkProducts(q_SHD, whole[:, 0], whole[:, 1], self.blocks, self.scale, self.rows.positions_S)


class _SharedLandmark(torch.autograd.Function):
    """``past``: output and log-sum-exp that were computed before."""

    @staticmethod
    def forward(
        ctx: Any,
        q_SHD: torch.Tensor,
        k_SKD: torch.Tensor,
        v_SKD: torch.Tensor,
        run: _Run,
        past: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out_SHD, lse_KGS = run.open(q_SHD, k_SKD, v_SKD).forward() if past is None else past
        out_SHD = out_SHD.to(q_SHD.dtype)
        ctx.run = run
        ctx.save_for_backward(q_SHD, k_SKD, v_SKD, out_SHD, lse_KGS)
        ctx.mark_non_differentiable(lse_KGS)
        return out_SHD, lse_KGS

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_SHD, k_SKD, v_SKD, out_SHD, lse_KGS = ctx.saved_tensors
        run: _Run = ctx.run
        dq, dk_LKD, dv_LKD = run.open(q_SHD, k_SKD, v_SKD).backward(grad_outputs[0], out_SHD, lse_KGS)
        dkv = add_up_rows(torch.stack([dk_LKD, dv_LKD], 1), run.rows, run.group)
        return dq.to(q_SHD.dtype), dkv[:, 0].to(k_SKD.dtype), dkv[:, 1].to(v_SKD.dtype), None, None
