"""Paged attention on a GPU in Triton alone, any element type: float32 models, and what ``torch_flash`` builds on.

Tokens of decoding sequences, which lie in front of a batch's chunks, see their keys in a kernel of their own
(``triton_decode.py``); chunks go to the kernel for ranges of keys (``triton_paged.py``).
"""

import torch

from longctx.attention.batch import AttentionShape, KeyRanges, PackedBatch
from longctx.attention.gpu_paged import GPUPagedAttention, refuse_without_triton


class TritonAttention(GPUPagedAttention):
    """GPU, head sizes up to 256."""

    name = "triton"
    page_sizes = ()
    preferred_page_size = 64

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return refuse_without_triton(device, head_dim)

    def attend(self, q_THD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        num_decode = batch.num_segments if batch.max_q_len == 1 else batch.num_decode
        outs = []
        if num_decode:
            outs.append(self.attend_newest(q_THD[:num_decode], shape, batch, num_decode))
        if num_decode < batch.num_segments:
            outs.append(self.attend_chunks(q_THD[num_decode:], shape, batch))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    @staticmethod
    def attend_newest(
        q_BHD: torch.Tensor, shape: AttentionShape, batch: PackedBatch, num_segments: int
    ) -> torch.Tensor:
        """Of the first segments, one token each; ``[B, H * D]``."""
        from longctx.attention.triton_decode import attend_newest

        tables, kv_lens = batch.block_tables_BP[:num_segments], batch.kv_lens_B[:num_segments]
        return attend_newest(q_BHD, shape, batch.pool, tables, kv_lens, max_kv_len=batch.max_kv_len)

    def attend_chunks(self, q_SHD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        """Of the segments behind ``batch.num_decode``; ``[S, H * D]``."""
        num_decode = batch.num_decode
        last_S = batch.positions_T[num_decode:].int() + 1
        first_S = torch.zeros_like(last_S) if shape.window is None else (last_S - shape.window).clamp_min(0)
        borders = batch.cu_seqlens_B1[num_decode:] - num_decode
        ranges = KeyRanges(borders, batch.block_tables_BP[num_decode:], first_S, last_S)
        return self.attend_ranges(q_SHD, shape, ranges, batch.pool)[0].to(q_SHD.dtype).flatten(1)
