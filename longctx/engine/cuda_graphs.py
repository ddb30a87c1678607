"""Decode steps captured as CUDA graphs, one for each of a few batch sizes.

A small decode step launches some hundred kernels that each take microseconds: replaying a graph launches them at once.
A step of ``n`` sequences replays the smallest captured size that holds them; the rows too many store nothing and attend
to whatever is the first token of the first page. Left out: graphs of prompt chunks, and models whose rotary angles
depend on the sequence's length.
"""

import logging
from bisect import bisect_left
from dataclasses import replace
from typing import Any

import torch

from longctx.attention.batch import PackedBatch
from longctx.engine.runner import ModelRunner

logger = logging.getLogger(__name__)

WARMUP_STEPS = 2  # kernels choose and compile their variants before the capture


def bucket_sizes(max_sequences: int) -> list[int]:
    """Batch sizes to capture: powers of two up to 8, then multiples of 16, and ``max_sequences`` itself."""
    sizes = [size for size in (1, 2, 4, 8, *range(16, max_sequences, 16)) if size < max_sequences]
    return [*sizes, max_sequences]


class CudaDecodeGraphs:
    """Captures on construction; see ``capture_decode_graphs``.

    Args:
        runner: whose decoder, inputs and rows are used.
        sizes: batch sizes, ascending.
        max_kv_len: longest sequence; kernels are captured for it.
    """

    def __init__(self, runner: ModelRunner, sizes: list[int], *, max_kv_len: int) -> None:
        self._runner = runner
        self._sizes = sizes
        self._max_kv_len = max_kv_len
        device = runner.inputs.input_ids.device_tensor.device
        self._borders = torch.arange(sizes[-1] + 1, dtype=torch.int32, device=device)  # one token per row
        self._row_idx = torch.arange(sizes[-1], dtype=torch.int64, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        memory = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            for size in reversed(sizes):  # the largest first: the others fit into its memory
                self._graphs[size] = self._capture(size, memory)

    def run(self, num_rows: int) -> torch.Tensor | None:
        """Logits ``[num_rows, vocab_size]``, valid until the next call, or None if no graph is that large."""
        position = bisect_left(self._sizes, num_rows)
        if num_rows == 0 or position == len(self._sizes):
            return None
        size = self._sizes[position]
        self._pad(num_rows, size)
        self._upload(size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:num_rows]

    def _capture(self, size: int, memory: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        self._pad(0, size)
        batch = self._upload(size)
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARMUP_STEPS):
                self._runner.decoder.forward(replace(batch))
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        # A copy: attention keeps what it derived from a batch, and those kernels must be in the graph too.
        with torch.cuda.graph(graph, pool=memory):
            logits = self._runner.decoder.forward(replace(batch))
        return graph, logits

    def _pad(self, num_rows: int, size: int) -> None:
        """Make rows ``num_rows`` to ``size`` sequences of one token that is not stored."""
        rows = self._runner.rows
        rows.input_ids[num_rows:size] = 0
        rows.positions[num_rows:size] = 0
        rows.slots[num_rows:size] = -1
        rows.kv_lens[num_rows:size] = 1
        rows.tables[num_rows:size, 0] = 0

    def _upload(self, size: int) -> PackedBatch:
        inputs = self._runner.inputs
        return PackedBatch(
            input_ids_T=inputs.input_ids.upload(size),
            positions_T=inputs.positions.upload(size),
            slots_T=inputs.slots.upload(size),
            cu_seqlens_B1=self._borders[: size + 1],
            kv_lens_B=inputs.kv_lens.upload(size),
            block_tables_BP=inputs.tables.upload(size),
            logit_rows_R=self._row_idx[:size],
            max_q_len=1,
            max_kv_len=self._max_kv_len,
            pool=self._runner.pool,
        )


def capture_decode_graphs(runner: ModelRunner, *, max_sequences: int, max_kv_len: int) -> None:
    """Give ``runner`` its decode graphs, or say in the log why it runs without them."""
    try:
        runner.graphs = CudaDecodeGraphs(runner, bucket_sizes(max_sequences), max_kv_len=max_kv_len)
    except RuntimeError as error:
        logger.warning("decode runs without CUDA graphs (engine.cuda_graphs): capture failed: %s", error)
