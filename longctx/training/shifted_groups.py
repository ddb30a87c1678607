"""Which heads of SF-Attn (``sf_attention.py``) attend in which groups of tokens. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class HeadSet:
    """Heads whose groups begin alike."""

    queries: slice
    keys: slice
    first_size: int  # tokens of a document's first group


def split_heads(group_size: int, returned_heads: float, num_heads: int, num_kv_heads: int) -> list[HeadSet]:
    """The heads in plain groups, and the last ones, which are shifted: KV heads with all of their query heads,
    unless there is but one."""
    num_units = num_kv_heads if num_kv_heads > 1 else num_heads
    half = num_units // 2
    cut = num_units - half + round(half * returned_heads)
    per_unit = num_heads // num_units
    sets = []
    for start, stop, first_size in ((0, cut, group_size), (cut, num_units, group_size // 2)):
        keys = slice(start, stop) if num_kv_heads > 1 else slice(0, 1)
        if start < stop:
            sets.append(HeadSet(slice(start * per_unit, stop * per_unit), keys, first_size))
    return sets


def cut_groups(documents: Sequence[int], first_size: int, group_size: int) -> tuple[int, ...]:
    """Boundaries of groups: in each document one of ``first_size`` tokens, then of ``group_size``, the rest."""
    bounds = [0]
    for start, stop in pairwise(documents):
        bounds += [*range(start + first_size, stop, group_size), stop]
    return tuple(bounds)
