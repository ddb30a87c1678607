"""Blocks of landmark attention: which tokens lie in which, and in which slots kernels find them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where the tokens of one sequence lie in blocks; int64, on the CPU."""

    size: int  # P; one above the longest block, or more
    rows_MP: torch.Tensor  # token of each slot; its landmark in the last, 0 where there is none
    lengths_M: torch.Tensor  # normal tokens
    block_S: torch.Tensor  # of each token
    seen_S: torch.Tensor  # normal tokens of its own block that each token sees
    first_S: torch.Tensor  # first block of each token's document

    @property
    def starts_M(self) -> torch.Tensor:
        """First token of each block."""
        return self.rows_MP[:, 0]

    def pad(self, size: int) -> "Blocks":
        """The same with ``size`` slots for each block, at least those that there are."""
        rows = self.rows_MP.new_zeros(len(self.rows_MP), size)
        rows[:, : self.size - 1], rows[:, -1] = self.rows_MP[:, :-1], self.rows_MP[:, -1]
        return replace(self, size=size, rows_MP=rows)


def find_blocks(is_landmark_S: torch.Tensor, bounds: Sequence[int]) -> Blocks:
    """Blocks of one sequence.

    Args:
        is_landmark_S: ``[seq]`` bool.
        bounds: of its documents, from 0 to seq.

    Raises:
        ValueError: if a block has no normal token.
    """
    num = len(is_landmark_S)
    is_last = is_landmark_S.clone()
    is_last[torch.tensor([stop - 1 for start, stop in pairwise(bounds) if start < stop], dtype=torch.int64)] = True
    stops = is_last.nonzero()[:, 0] + 1
    starts = torch.cat([stops.new_zeros(1), stops[:-1]])
    has_landmark = is_landmark_S[stops - 1]
    lengths = stops - starts - has_landmark.long()
    if not bool((lengths > 0).all()):
        at = int(starts[(lengths == 0).nonzero()[0, 0]])
        raise ValueError(f"is_landmark is not allowed: the block at token {at} has no token but its landmark")
    size = int(lengths.max()) + 1  # the landmark has a slot
    slots = torch.arange(size)
    rows = torch.where(slots < lengths[:, None], starts[:, None] + slots, 0)
    rows[:, -1] = torch.where(has_landmark, stops - 1, 0)
    block = torch.repeat_interleave(torch.arange(len(stops)), stops - starts)
    tokens = torch.arange(num)
    seen = torch.minimum(tokens - starts[block] + 1, lengths[block])
    document_starts = torch.tensor([start for start, stop in pairwise(bounds) if start < stop], dtype=torch.int64)
    document = torch.searchsorted(document_starts, tokens, right=True) - 1
    first = block[document_starts][document]
    return Blocks(size, rows, lengths, block, seen, first)
