"""What a batch under CCA attention says besides: which cores and tokens each query sees, and which groups end in it.

Shape legend: T tokens in the batch, B segments, N groups that end or cores that are seen, g tokens of a group, M = N *
g, P pages, D rotary dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from longctx.attention.batch import KeyRanges

Kept = Sequence[int] | npt.NDArray[np.int64]


@dataclass(slots=True)
class EndingGroups:
    """Groups of one size whose last token is in the batch; their cores are made in this step. On the model's device."""

    group_size: int
    last_rows_N: torch.Tensor  # int64, rows of T
    slots_M: torch.Tensor  # int64 [N * g], where the tokens' keys and values are
    positions_M: torch.Tensor  # int64 [N * g], of the tokens
    core_slots_N: torch.Tensor  # int64, where the cores go
    bound_slots_N: torch.Tensor | None = None  # int64, where the groups' bounds go, if groups are fetched
    cos_MD: torch.Tensor | None = None  # float32, at ``positions_M``; set in the first layer
    sin_MD: torch.Tensor | None = None


@dataclass(slots=True)
class CoreSegment:
    """What one sequence of the batch has beyond its window, for groups that are fetched. On the model's device."""

    rows: slice  # of T
    group_size: int
    core_slots_N: torch.Tensor  # int64, of all cores that any of its tokens sees: at least one
    bound_slots_N: torch.Tensor  # int64, of their groups' bounds
    table_P: torch.Tensor  # int64, the pages of tokens that it still has
    num_passed: int  # pages before those
    kept: Kept  # where these are below


@dataclass(slots=True)
class CoreBatch:
    """Of one batch; constant over its layers. Rows of the ranges are the batch's tokens."""

    near: KeyRanges  # tokens as they are; tables hold the pages that the sequences still have
    far: KeyRanges | None  # cores; None: no token of the batch sees one
    ending: tuple[EndingGroups, ...]  # by group size
    num_cores_T: torch.Tensor  # int64, cores that a token sees
    segments: tuple[CoreSegment, ...] = ()  # where groups are fetched: sequences that see a core
