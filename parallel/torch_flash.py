"""torch's own flash kernel on one tile: ``aten::_flash_attention_forward`` and its backward, the dense form.

What a GPU without the flash-attn package runs. The operators are those below ``torch.nn.attention.varlen`` (torch
2.13): they take ``[B, S, H, D]``, fewer KV heads than query heads, and no cumulative lengths for a batch of equal
ones. Not run on the project's CPU machines: the tests there check the arguments against their documented meaning, and
the shapes on torch's meta device.
"""

import torch

from parallel.flash_kernel import FlashKernel, FlashMask, refuse_without_gpu

AMPERE = (8, 0)  # the first GPU generation that the kernel runs on

_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward


class TorchFlash(FlashKernel):
    """GPU from the Ampere generation on, float16 and bfloat16."""

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        reason = refuse_without_gpu(device, dtype, head_dim)
        if reason is None and torch.cuda.get_device_capability(device) < AMPERE:
            return "the GPU is older than the Ampere generation"
        return reason

    def attend(
        self, q_BSHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, mask: FlashMask, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out_BSHD, lse_BHS, *_ = _flash(
            q_BSHD,
            k_BLKD,
            v_BLKD,
            None,
            None,
            q_BSHD.shape[1],
            k_BLKD.shape[1],
            0.0,
            mask.is_causal,
            False,
            scale=scale,
            window_size_left=mask.left,
            window_size_right=mask.right,
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
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q_BSHD.device)
        return _flash_backward(
            dout_BSHD,
            q_BSHD,
            k_BLKD,
            v_BLKD,
            out_BSHD,
            lse_BHS,
            None,
            None,
            q_BSHD.shape[1],
            k_BLKD.shape[1],
            0.0,
            mask.is_causal,
            no_dropout,
            no_dropout,
            scale=scale,
            window_size_left=mask.left,
            window_size_right=mask.right,
        )
