"""The flash-attn package on one tile: its public forward, and the backward below its autograd function.

Written for flash-attn 2.7 and later, whose low-level backward takes the two sides of a window apart. Not run on the
project's CPU machines: the tests there check the arguments against the package's documented meaning.
"""

from importlib import import_module
from importlib.util import find_spec

import torch

from parallel.flash_kernel import FlashKernel, FlashMask, refuse_without_gpu


class FlashAttn(FlashKernel):
    """GPU, float16 and bfloat16, needs the flash-attn package (``pip install longctx[gpu]``)."""

    def __init__(self) -> None:
        self._forward = import_module("flash_attn").flash_attn_func
        self._backward = import_module("flash_attn.flash_attn_interface")._flash_attn_backward

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        reason = refuse_without_gpu(device, dtype, head_dim)
        if reason is None and find_spec("flash_attn") is None:
            return "the flash-attn package is not installed (extra longctx[gpu])"
        return reason

    def attend(
        self, q_BSHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, mask: FlashMask, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out_BSHD, lse_BHS, _ = self._forward(
            q_BSHD,
            k_BLKD,
            v_BLKD,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=mask.is_causal,
            window_size=(mask.left, mask.right),
            return_attn_probs=True,  # which also brings the log-sum-exp; without dropout, no probabilities
        )
        return out_BSHD, lse_BHS

    def differentiate(
        self,
        dout_BSHD: torch.Tensor,
        q_BSHD: torch.Tensor,
        k_BLKD: torch.Tensor,
        v_BLKD: torch.Tensor,
        out_BSHD: torch.Tensor,
        lse_BHS: torch.Tensor,
        mask: FlashMask,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BSHD, k_BLKD, v_BLKD))
        self._backward(
            dout=dout_BSHD,
            q=q_BSHD,
            k=k_BLKD,
            v=v_BLKD,
            out=out_BSHD,
            softmax_lse=lse_BHS,
            dq=dq,
            dk=dk,
            dv=dv,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=mask.is_causal,
            window_size_left=mask.left,
            window_size_right=mask.right,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv
