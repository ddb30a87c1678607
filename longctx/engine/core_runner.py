"""Lays out batches under CCA attention."""

from collections.abc import Callable

import numpy as np
import torch

from longctx.attention.batch import PackedBatch
from longctx.engine.core_rows import CoreRows
from longctx.engine.core_step import CoreStep, lay_cores
from longctx.engine.runner import Decoder, ModelRunner
from longctx.engine.scheduler import Chunk
from memory.pages import PagePool


class CoreRunner(ModelRunner):
    """As ``ModelRunner``.

    Args:
        decoder, pool, rows, device: as there. Where rows have bounds, groups are fetched
            (``longctx/attention/core_fetch.py``).
    """

    rows: CoreRows

    def __init__(self, decoder: Decoder, pool: PagePool, *, rows: CoreRows, device: torch.device) -> None:
        super().__init__(decoder, pool, rows=rows, device=device)
        self._device = device

    def lay_step(
        self, chunks: list[Chunk], on_layer: Callable[[int], None] | None = None
    ) -> tuple[PackedBatch, CoreStep]:
        """The next step, as on one rank, but for what is seen; the step's arrays are valid until the next call."""
        batch = super()._lay_out(chunks, on_layer)
        rows, num_segments, num_tokens = self.rows, batch.num_segments, len(batch.positions_T)
        return batch, CoreStep(
            rows.page_size,
            rows.input_ids[:num_tokens],
            rows.positions[:num_tokens],
            rows.slots[:num_tokens],
            self.inputs.cu_seqlens.array[: num_segments + 1],
            rows.kv_lens[:num_segments],
            rows.tables[:num_segments],
            rows.num_passed[:num_segments],
            rows.core_tables[:num_segments],
            rows.group_sizes[:num_segments],
            rows.windows[:num_segments],
            self.inputs.logit_rows.array[: len(batch.logit_rows_R)],
            rows.core_stride,
            self._list_kept(chunks) if rows.core_stride > 1 else (),
        )

    def _lay_out(self, chunks: list[Chunk], on_layer: Callable[[int], None] | None) -> PackedBatch:
        batch, step = self.lay_step(chunks, on_layer)
        batch.cores = lay_cores(step, self._upload)
        return batch

    def _list_kept(self, chunks: list[Chunk]) -> tuple[list[int], ...]:
        every = [sequence.cores for sequence in (*self.rows.sequences, *(chunk.sequence for chunk in chunks))]
        return tuple(cores.kept for cores in every if cores is not None)

    def _upload(self, array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        """A copy on the model's device."""
        return torch.tensor(array, dtype=dtype).to(self._device, non_blocking=True)
