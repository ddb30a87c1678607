"""Computes one step: lays out the packed batch, copies it to the device if there is one, and runs the decoder.

On a CPU the batch's tensors are views of the host arrays: a decode step builds nothing. On a GPU the same arrays are
pinned and copied without blocking.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from longctx.attention.batch import PackedBatch
from longctx.engine.config import EngineConfig
from longctx.engine.rows import DecodeRows
from longctx.engine.scheduler import Chunk
from longctx.models.packed import PackedDecoder
from memory.pages import PagePool


class Decoder(Protocol):
    """What the runner needs of a model (``longctx.models.packed.PackedDecoder``)."""

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Logits float32 ``[R, vocab_size]``."""
        ...


class Runner(Protocol):
    """What the engine needs of whatever computes its steps."""

    def run(self, chunks: list[Chunk], on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """See ``ModelRunner.run``."""
        ...

    @property
    def pool(self) -> PagePool:
        """The pages of this process."""
        ...

    def keep_alive(self) -> None:
        """Called now and then between steps."""
        ...

    def close(self) -> None:
        """Nothing is run any more."""
        ...


class DecodeGraphs(Protocol):
    """Captured decode steps (``longctx.engine.cuda_graphs``)."""

    def run(self, num_rows: int) -> torch.Tensor | None:
        """Logits of a decode step over the first ``num_rows`` rows, or None if no graph is that large."""
        ...


class Mirror:
    """A host array and its copy on the device; on a CPU they are one."""

    __slots__ = ("_host", "array", "device_tensor")

    def __init__(self, array: npt.NDArray[Any], device: torch.device) -> None:
        self._host = torch.from_numpy(array)
        self.device_tensor = self._host
        if device.type != "cpu":
            self._host = self._host.pin_memory()
            self.device_tensor = torch.zeros_like(self._host, device=device)
        self.array: npt.NDArray[Any] = self._host.numpy()

    def upload(self, count: int) -> torch.Tensor:
        """The first ``count`` entries, on the device once its stream gets there."""
        if self.device_tensor is self._host:
            return self._host[:count]
        return self.device_tensor[:count].copy_(self._host[:count], non_blocking=True)


class StepInputs:
    """Everything a step uploads. The arrays of ``rows`` are moved into pinned memory when there is a GPU."""

    def __init__(self, rows: DecodeRows, device: torch.device, *, needs_rope_lens: bool) -> None:
        num_rows, num_tokens = len(rows.kv_lens), len(rows.input_ids)
        self.input_ids, self.positions = (Mirror(rows.input_ids, device), Mirror(rows.positions, device))
        self.slots, self.kv_lens = (Mirror(rows.slots, device), Mirror(rows.kv_lens, device))
        self.tables = Mirror(rows.tables, device)
        rows.input_ids, rows.positions, rows.slots = (self.input_ids.array, self.positions.array, self.slots.array)
        rows.kv_lens, rows.tables = self.kv_lens.array, self.tables.array
        self.cu_seqlens = Mirror(np.arange(num_rows + 1, dtype=np.int32), device)
        self.logit_rows = Mirror(np.arange(num_rows, dtype=np.int64), device)
        self.rope_lens = Mirror(np.zeros(num_tokens, dtype=np.int64), device) if needs_rope_lens else None


class ModelRunner:
    """Runs the decoder over the decode rows and a step's prompt chunks.

    Args:
        decoder: the model.
        pool: its pages.
        rows: the decoding sequences.
        device: where the model is.
        needs_rope_lens: whether rotary angles depend on a sequence's length.
    """

    def __init__(
        self, decoder: Decoder, pool: PagePool, *, rows: DecodeRows, device: torch.device, needs_rope_lens: bool = False
    ) -> None:
        self.decoder = decoder
        self.pool = pool
        self.rows = rows
        self.inputs = StepInputs(rows, device, needs_rope_lens=needs_rope_lens)
        self.graphs: DecodeGraphs | None = None
        self._is_uniform = True  # cu_seqlens and logit_rows say one token per segment
        self._stream_owner = device if device.type == "cuda" else None

    @torch.inference_mode()
    def run(self, chunks: list[Chunk], on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Logits float32 ``[decode rows + last chunks, vocab_size]``: one row per decoding sequence, then one for each
        chunk that ends its sequence. ``on_layer`` is called as each layer's KV is stored."""
        self.rows.locate_tokens()
        if not chunks and self.graphs is not None:
            logits = self.graphs.run(len(self.rows.sequences))
            if logits is not None:
                return logits
        batch = self._lay_out(chunks, on_layer)
        logits = self.decoder.forward(batch)
        if self._stream_owner is not None and not len(logits):
            # Nobody reads tokens back from this step, so nothing else waits until the pinned arrays may be written.
            torch.cuda.current_stream(self._stream_owner).synchronize()
        return logits

    def keep_alive(self) -> None:
        """Nobody waits for it."""

    def close(self) -> None:
        """Nothing to give back."""

    def _lay_out(self, chunks: list[Chunk], on_layer: Callable[[int], None] | None) -> PackedBatch:
        rows, inputs = self.rows, self.inputs
        num_segments = num_logits = num_tokens = len(rows.sequences)
        if inputs.rope_lens is not None:
            inputs.rope_lens.array[:num_tokens] = rows.kv_lens[:num_tokens]
        if not self._is_uniform:
            inputs.cu_seqlens.array[:] = np.arange(len(inputs.cu_seqlens.array))
            inputs.logit_rows.array[:] = np.arange(len(inputs.logit_rows.array))
        self._is_uniform = not chunks
        for chunk in chunks:
            self._lay_chunk(chunk, num_segments, num_tokens)
            num_segments += 1
            num_tokens += chunk.stop - chunk.start
            inputs.cu_seqlens.array[num_segments] = num_tokens
            if chunk.is_last:
                inputs.logit_rows.array[num_logits] = num_tokens - 1
                num_logits += 1
        return PackedBatch(
            input_ids_T=inputs.input_ids.upload(num_tokens),
            positions_T=inputs.positions.upload(num_tokens),
            slots_T=inputs.slots.upload(num_tokens),
            cu_seqlens_B1=inputs.cu_seqlens.upload(num_segments + 1),
            kv_lens_B=inputs.kv_lens.upload(num_segments),
            block_tables_BP=inputs.tables.upload(num_segments),
            logit_rows_R=inputs.logit_rows.upload(num_logits),
            max_q_len=max((chunk.stop - chunk.start for chunk in chunks), default=1),
            max_kv_len=int(rows.kv_lens[:num_segments].max()),
            pool=self.pool,
            num_decode=len(rows.sequences),
            chunk_lens=tuple((chunk.stop - chunk.start, chunk.stop) for chunk in chunks),
            rope_lens_T=None if inputs.rope_lens is None else inputs.rope_lens.upload(num_tokens),
            on_layer=on_layer,
        )

    def _lay_chunk(self, chunk: Chunk, row: int, first_token: int) -> None:
        sequence = chunk.sequence
        positions = self.rows.lay_chunk(sequence, chunk.start, chunk.stop, row=row, first_token=first_token)
        if self.inputs.rope_lens is not None:
            lens = self.inputs.rope_lens.array[first_token : first_token + len(positions)]
            np.maximum(positions + 1, sequence.rope_floor, out=lens)


def make_local_runner(
    decoder: PackedDecoder, pool: PagePool, rows: DecodeRows, *, config: EngineConfig, max_context: int
) -> ModelRunner:
    """A runner for this process alone; on a GPU, decode steps are captured as graphs where that is possible."""
    depends_on_length = decoder.rotary.depends_on_length
    runner = ModelRunner(decoder, pool, rows=rows, device=decoder.device, needs_rope_lens=depends_on_length)
    can_capture = decoder.device.type == "cuda" and decoder.backend.graph_capturable and not depends_on_length
    if config.cuda_graphs and can_capture:
        from longctx.engine.cuda_graphs import capture_decode_graphs

        capture_decode_graphs(runner, max_sequences=config.max_sequences, max_kv_len=max_context)
    return runner
