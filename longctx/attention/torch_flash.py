"""Paged attention through what every CUDA build of torch brings: its flash kernel for prompts, Triton for decode.

What a GPU without the flash-attn package runs. In every layer a chunk's pages are gathered into one piece, which costs
a few hundredths of attending to them, and ``aten::_flash_attention_forward`` is called, which is below
``torch.nn.attention.varlen``. Decode and ranges of keys are ``triton_attention.py``'s.
"""

from dataclasses import dataclass

import torch

from longctx.attention.batch import AttentionShape, PackedBatch
from longctx.attention.gpu_paged import refuse_without_gpu, window_size
from longctx.attention.triton_attention import TritonAttention

AMPERE = (8, 0)  # the first GPU generation that the kernel runs on

_flash = torch.ops.aten._flash_attention_forward


@dataclass(frozen=True, slots=True)
class _Chunks:
    """What the flash kernel is told of a batch's chunks."""

    pages_P: torch.Tensor  # int64, of all of them
    cu_seqlens_q: torch.Tensor  # int32, from 0 on
    cu_seqlens_k: torch.Tensor  # int32, whole pages each
    kv_lens: torch.Tensor  # int32
    max_q_len: int
    max_kv_len: int


class TorchFlashAttention(TritonAttention):
    """GPU from the Ampere generation on, float16 and bfloat16."""

    name = "torch_flash"

    def __init__(self) -> None:
        self._batch: PackedBatch | None = None
        self._chunks: _Chunks | None = None

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        reason = refuse_without_gpu(device, dtype, head_dim)
        if reason is None and torch.cuda.get_device_capability(device) < AMPERE:
            return "the GPU is older than the Ampere generation"
        return reason

    def attend_chunks(self, q_SHD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        if batch is not self._batch or self._chunks is None:
            self._batch, self._chunks = batch, _lay_chunks(batch)
        chunks, (left, right) = self._chunks, window_size(shape)
        k, v = (pages.index_select(0, chunks.pages_P).flatten(0, 1) for pages in batch.pool.views(shape.layer_idx))
        out_SHD = _flash(
            q_SHD,
            k,
            v,
            chunks.cu_seqlens_q,
            chunks.cu_seqlens_k,
            chunks.max_q_len,
            chunks.max_kv_len,
            0.0,
            True,
            False,
            scale=shape.scale,
            window_size_left=left,
            window_size_right=right,
            seqused_k=chunks.kv_lens,
        )[0]
        return out_SHD.flatten(1)


def _lay_chunks(batch: PackedBatch) -> _Chunks:
    """Once for all layers. Waits for the GPU where the host does not know the lengths."""
    num_decode, lens = batch.num_decode, batch.chunk_lens
    if lens is None:
        num_tokens, num_keys = batch.cu_seqlens_B1.diff().tolist(), batch.kv_lens_B.tolist()
        lens = tuple(zip(num_tokens, num_keys, strict=True))[num_decode:]
    size = batch.pool.layout.page_size
    counts = [batch.pool.layout.num_pages(num_keys) for _, num_keys in lens]
    tables_BP, kv_lens = batch.block_tables_BP[num_decode:], batch.kv_lens_B[num_decode:]
    padded = ((kv_lens + (size - 1)) // size * size).cumsum(0, dtype=torch.int32)
    return _Chunks(
        pages_P=torch.cat([table[:count] for table, count in zip(tables_BP, counts, strict=True)]).long(),
        cu_seqlens_q=batch.cu_seqlens_B1[num_decode:] - num_decode,
        cu_seqlens_k=torch.nn.functional.pad(padded, (1, 0)),
        kv_lens=kv_lens,
        max_q_len=max(num_queries for num_queries, _ in lens),
        max_kv_len=max(num_keys for _, num_keys in lens),
    )
