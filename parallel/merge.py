"""Adds partial attention over other keys to what there is, by log-sum-exp, as Flash-Decoding does."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch

from parallel.registry import Registry

MERGES = Registry(
    "merge",
    {
        "torch": "parallel.merge:merge_with_torch_",
        "triton": "parallel.triton_merge:merge_with_triton_",
    },
)


def merge_partial_(
    out_BSHD: torch.Tensor, lse_BSH: torch.Tensor, partial_out_BSHD: torch.Tensor, partial_lse_BSH: torch.Tensor
) -> None:
    """Merge a partial result into ``out_BSHD`` and ``lse_BSH``, in place, with the device's implementation.

    Args:
        out_BSHD, lse_BSH: float32 (float64); a row that has seen nothing yet is zero and minus infinity. The batch
            dimension may be missing.
        partial_out_BSHD: the same shape, in the same dtype or in half precision.
        partial_lse_BSH: shape and dtype of ``lse_BSH``; every row has seen at least one key.
    """
    choose_merge(out_BSHD.device.type)(out_BSHD, lse_BSH, partial_out_BSHD, partial_lse_BSH)


@cache
def choose_merge(device_type: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """Triton's kernel on a GPU where Triton is installed, which torch's CUDA builds see to; torch's operators else."""
    return MERGES.get("triton" if device_type == "cuda" and find_spec("triton") else "torch")


def merge_with_torch_(
    out_BSHD: torch.Tensor, lse_BSH: torch.Tensor, partial_out_BSHD: torch.Tensor, partial_lse_BSH: torch.Tensor
) -> None:
    """``merge_partial_`` anywhere. Only the difference of the log-sum-exps counts, so large ones cost no precision."""
    weight_BSH = torch.sigmoid(partial_lse_BSH - lse_BSH)
    out_BSHD.lerp_(partial_out_BSHD.to(out_BSHD.dtype), weight_BSH[..., None])
    lse_BSH.copy_(torch.logaddexp(lse_BSH, partial_lse_BSH))
