"""The highest scores, with ties decided alike in every step.

Ties are the rule in the first layer, where keys of the same tokens are the same: rounding must not decide them, since
a step of another shape rounds otherwise.
"""

import ctypes
import logging
from functools import cache

import torch

from longctx.kernels.build import NativeBuildError, load_native

logger = logging.getLogger(__name__)

TIES = 1024  # scores that are equal when rounded to this fraction are, and the newest wins
MAX_NATIVE = 64  # MAX_RANKED of ranking.c


def rank_scores(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Indices ``[..., top_k]`` of the highest of ``scores [..., N]``, ascending; -1 for those that are none, in front.

    A score of minus infinity is none.

    Args:
        scores: float32.
        top_k: at least 1, and small: without native code scores are looked at so many times.
    """
    library = _load() if scores.device.type == "cpu" and top_k <= MAX_NATIVE else None
    if library is None:
        return rank_with_torch(scores, top_k)
    scores = scores.contiguous()
    num_scores = scores.shape[-1]
    ranked = torch.empty((*scores.shape[:-1], top_k), dtype=torch.int64)
    num_rows, num_threads = ranked.numel() // top_k, torch.get_num_threads()
    library.longctx_rank(scores.data_ptr(), ranked.data_ptr(), num_rows, num_scores, top_k, TIES, num_threads)
    return ranked


def rank_with_torch(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """``rank_scores`` on any device."""
    num_scores = scores.shape[-1]
    newest_first = scores.flip(-1).mul_(TIES).round_()
    ranked = scores.new_full((*scores.shape[:-1], top_k), -1, dtype=torch.int64)
    for idx in range(min(top_k, num_scores)):
        best = newest_first.max(-1, keepdim=True)
        is_none = best.values == float("-inf")
        ranked[..., idx, None] = (num_scores - 1 - best.indices).masked_fill_(is_none, -1)
        newest_first.scatter_(-1, best.indices, float("-inf"))
    return ranked.sort(-1).values


@cache
def _load() -> ctypes.CDLL | None:
    try:
        return load_native()
    except NativeBuildError as error:
        logger.info("scores are ranked with torch: %s", error)
        return None
