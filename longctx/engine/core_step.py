"""One step under CCA attention, as host arrays: what it computes, and which cores and tokens each query sees.

Shape legend: T tokens, B sequences, P pages of the longest table, R rows whose logits are wanted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from longctx.attention.batch import KeyRanges
from longctx.attention.core_batch import CoreBatch, CoreSegment, EndingGroups, Kept
from longctx.engine.core_rows import first_tokens, locate_entries
from longctx.engine.sequence import Int64Array

Upload = Callable[[np.ndarray, torch.dtype], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class CoreStep:
    """Integers all; tables hold page ids. Tokens of one sequence are neighbours, and ascend."""

    page_size: int
    input_ids_T: Int64Array
    positions_T: Int64Array
    slots_T: Int64Array
    cu_seqlens_B1: np.ndarray
    kv_lens_B: np.ndarray
    tables_BP: np.ndarray  # of the tokens that sequences still have
    num_passed_B: Int64Array  # pages of tokens before those
    core_tables_BP: np.ndarray
    group_sizes_B: Int64Array
    windows_B: Int64Array
    logit_rows_R: Int64Array
    core_stride: int = 1  # as in ``CoreCapacity``
    kept_B: tuple[Kept, ...] = ()  # where groups are fetched: pages below that hold the passed ones, and more

    @property
    def row_T(self) -> Int64Array:
        """Which sequence a token is of."""
        return np.repeat(np.arange(len(self.kv_lens_B)), np.diff(self.cu_seqlens_B1))

    def first_T(self, row_T: Int64Array) -> Int64Array:
        """The first token that each one sees as it is."""
        return first_tokens(self.positions_T, self.group_sizes_B[row_T], self.windows_B[row_T])

    def locate(self, rows: Int64Array, positions: Int64Array) -> Int64Array:
        """Slots of tokens at ``positions`` of the sequences of ``rows``; both of one shape."""
        return locate_entries(self.tables_BP, rows, positions, self.page_size, self.num_passed_B)

    def locate_cores(self, rows: Int64Array, core_idx: Int64Array) -> Int64Array:
        """Slots of cores by their number in the sequence."""
        return locate_entries(self.core_tables_BP[:, :: self.core_stride], rows, core_idx, self.page_size)

    def locate_bounds(self, rows: Int64Array, core_idx: Int64Array) -> Int64Array:
        """Slots of groups' bounds, where there are any."""
        return locate_entries(self.core_tables_BP[:, 1 :: self.core_stride], rows, core_idx, self.page_size)


def lay_cores(step: CoreStep, upload: Upload, *, own: slice | None = None) -> CoreBatch:
    """What attention needs of a step.

    Args:
        step: all of it.
        upload: a copy of an array on the model's device.
        own: tokens whose queries are computed here; None: all. Groups that end are all there nevertheless.
    """
    own = slice(0, len(step.positions_T)) if own is None else own
    row_T = step.row_T
    first_T = step.first_T(row_T)
    num_cores_T = first_T // step.group_sizes_B[row_T]
    passed_T = step.num_passed_B[row_T] * step.page_size
    borders = np.clip(step.cu_seqlens_B1, own.start, own.stop) - own.start
    has_rows = np.flatnonzero(np.diff(borders))
    cu_seqlens_B1 = upload(np.concatenate((borders[:1], borders[has_rows + 1])), torch.int32)
    tables_BP = upload(step.tables_BP[has_rows], torch.int32)
    first_S, last_S = ((x - passed_T)[own] for x in (first_T, step.positions_T + 1))
    far, most = None, int(num_cores_T[own].max(initial=0))
    if most:
        core_tables = step.core_tables_BP[has_rows, :: step.core_stride][:, : -(-most // step.page_size)]
        last = upload(num_cores_T[own], torch.int32)
        far = KeyRanges(cu_seqlens_B1, upload(core_tables, torch.int32), torch.zeros_like(last), last)
    return CoreBatch(
        near=KeyRanges(cu_seqlens_B1, tables_BP, upload(first_S, torch.int32), upload(last_S, torch.int32)),
        far=far,
        ending=_find_ending(step, row_T, upload),
        num_cores_T=upload(num_cores_T[own], torch.int64),
        segments=tuple(_list_segments(step, num_cores_T[own], borders, upload)) if step.core_stride > 1 else (),
    )


def _list_segments(
    step: CoreStep, num_cores_T: Int64Array, borders_B1: np.ndarray, upload: Upload
) -> Iterator[CoreSegment]:
    """Sequences with tokens here that see a core; ``num_cores_T`` is of these tokens, ``borders_B1`` theirs."""
    num_pages_B = -(-step.kv_lens_B // step.page_size) - step.num_passed_B
    for row, (start, stop) in enumerate(pairwise(borders_B1.tolist())):
        num_cores = int(num_cores_T[stop - 1]) if stop > start else 0
        if num_cores:
            core_idx = np.arange(num_cores)
            row_N = np.full_like(core_idx, row)
            yield CoreSegment(
                slice(start, stop),
                int(step.group_sizes_B[row]),
                upload(step.locate_cores(row_N, core_idx), torch.int64),
                upload(step.locate_bounds(row_N, core_idx), torch.int64),
                upload(step.tables_BP[row, : num_pages_B[row]], torch.int64),
                int(step.num_passed_B[row]),
                step.kept_B[row],
            )


def _find_ending(step: CoreStep, row_T: Int64Array, upload: Upload) -> tuple[EndingGroups, ...]:
    """Groups whose last token is in the step, those of one size together."""
    group_size_T = step.group_sizes_B[row_T]
    last_rows = np.flatnonzero((step.positions_T + 1) % group_size_T == 0)
    found = []
    for size in np.unique(group_size_T[last_rows]).tolist():
        last_N = last_rows[group_size_T[last_rows] == size]
        row_N, stop_N = row_T[last_N], step.positions_T[last_N] + 1
        position_Ng = stop_N[:, None] + np.arange(-size, 0)
        slots_Ng = step.locate(np.broadcast_to(row_N[:, None], position_Ng.shape), position_Ng)
        arrays = [last_N, slots_Ng.reshape(-1), position_Ng.reshape(-1), step.locate_cores(row_N, stop_N // size - 1)]
        if step.core_stride > 1:
            arrays.append(step.locate_bounds(row_N, stop_N // size - 1))
        found.append(EndingGroups(size, *(upload(array, torch.int64) for array in arrays)))
    return tuple(found)
