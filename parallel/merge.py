"""Adds partial attention over other keys to what there is, by log-sum-exp, as Flash-Decoding does."""

import torch


def merge_partial_(
    out_BSHD: torch.Tensor, lse_BSH: torch.Tensor, partial_out_BSHD: torch.Tensor, partial_lse_BSH: torch.Tensor
) -> None:
    """Merge a partial result into ``out_BSHD`` and ``lse_BSH``, in place.

    Args:
        out_BSHD, lse_BSH: float32 (float64); a row that has seen nothing yet is zero and minus infinity.
        partial_out_BSHD, partial_lse_BSH: the same shapes and dtype; every row has seen at least one key.
    """
    lse_new = torch.logaddexp(lse_BSH, partial_lse_BSH)
    out_BSHD.mul_(torch.exp(lse_BSH - lse_new)[..., None])
    out_BSHD.addcmul_(partial_out_BSHD, torch.exp(partial_lse_BSH - lse_new)[..., None])
    lse_BSH.copy_(lse_new)
