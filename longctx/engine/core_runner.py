"""Lays out batches under CCA attention: which cores and tokens each query sees, and which groups end."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from longctx.attention.batch import KeyRanges, PackedBatch
from longctx.attention.core_batch import CoreBatch, CoreSegment, EndingGroups
from longctx.engine.core_rows import CoreRows, first_tokens
from longctx.engine.runner import Decoder, ModelRunner
from longctx.engine.scheduler import Chunk
from longctx.engine.sequence import Int64Array, Sequence
from memory.pages import PagePool


class CoreRunner(ModelRunner):
    """As ``ModelRunner``.

    Args:
        decoder, pool, rows, device: as there.
        fetches: whether groups are fetched (``longctx/attention/core_fetch.py``).
    """

    rows: CoreRows

    def __init__(
        self, decoder: Decoder, pool: PagePool, *, rows: CoreRows, device: torch.device, fetches: bool = False
    ) -> None:
        super().__init__(decoder, pool, rows=rows, device=device)
        self._fetches = fetches

    def _lay_out(self, chunks: list[Chunk], on_layer: Callable[[int], None] | None) -> PackedBatch:
        batch = super()._lay_out(chunks, on_layer)
        rows, num_segments, num_tokens = self.rows, batch.num_segments, len(batch.positions_T)
        num_queries = np.ones(num_segments, dtype=np.int64)
        num_queries[len(rows.sequences) :] = [chunk.stop - chunk.start for chunk in chunks]
        row_T = np.repeat(np.arange(num_segments), num_queries)
        position_T, group_size_T = rows.positions[:num_tokens], rows.group_sizes[row_T]
        first_T = first_tokens(position_T, group_size_T, rows.windows[row_T])
        passed_T = rows.num_passed[row_T] * rows.page_size
        batch.cores = CoreBatch(
            near=KeyRanges(
                batch.cu_seqlens_B1,
                batch.block_tables_BP,
                self._upload(first_T - passed_T, torch.int32),
                self._upload(position_T + 1 - passed_T, torch.int32),
            ),
            far=self._see_cores(batch, first_T // group_size_T),
            ending=self._find_ending(row_T, position_T, group_size_T),
            num_cores_T=self._upload(first_T // group_size_T, torch.int64),
        )
        if self._fetches:
            sequences = [*rows.sequences, *(chunk.sequence for chunk in chunks)]
            batch.cores.segments = tuple(self._list_segments(sequences, num_queries, first_T))
        return batch

    def _list_segments(
        self, sequences: list[Sequence], num_queries: Int64Array, first_T: Int64Array
    ) -> Iterator[CoreSegment]:
        stops = num_queries.cumsum()
        for row, (sequence, stop) in enumerate(zip(sequences, stops.tolist(), strict=True)):
            cores = sequence.cores
            assert cores is not None
            num_cores = int(first_T[stop - 1]) // cores.sizes.group_size
            if num_cores:
                core_idx = np.arange(num_cores)
                slots = self.rows.locate_cores(np.full_like(core_idx, row), core_idx)
                yield CoreSegment(
                    slice(stop - int(num_queries[row]), stop),
                    cores.sizes.group_size,
                    self._upload(slots, torch.int64),
                    self._upload(np.array(sequence.pages), torch.int64),
                    cores.num_passed,
                    cores.kept,
                )

    def _see_cores(self, batch: PackedBatch, num_cores_T: Int64Array) -> KeyRanges | None:
        most = int(num_cores_T.max())
        if not most:
            return None
        tables = self.rows.core_tables[: batch.num_segments, : -(-most // self.rows.page_size)]
        last_T = self._upload(num_cores_T, torch.int32)
        return KeyRanges(batch.cu_seqlens_B1, self._upload(tables, torch.int32), torch.zeros_like(last_T), last_T)

    def _find_ending(
        self, row_T: Int64Array, position_T: Int64Array, group_size_T: Int64Array
    ) -> tuple[EndingGroups, ...]:
        """Groups whose last token is in the batch, those of one size together."""
        last_rows = np.flatnonzero((position_T + 1) % group_size_T == 0)
        found = []
        for size in np.unique(group_size_T[last_rows]).tolist():
            last_N = last_rows[group_size_T[last_rows] == size]
            row_N, stop_N = row_T[last_N], position_T[last_N] + 1
            position_Ng = stop_N[:, None] + np.arange(-size, 0)
            slots_Ng = self.rows.locate(np.broadcast_to(row_N[:, None], position_Ng.shape), position_Ng)
            core_slots_N = self.rows.locate_cores(row_N, stop_N // size - 1)
            arrays = (last_N, slots_Ng.reshape(-1), position_Ng.reshape(-1), core_slots_N)
            found.append(EndingGroups(size, *(self._upload(array, torch.int64) for array in arrays)))
        return tuple(found)

    def _upload(self, array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        """A copy on the model's device."""
        return torch.tensor(array, dtype=dtype).to(self.inputs.positions.device_tensor.device, non_blocking=True)
