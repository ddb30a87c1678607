"""Paged attention through torch's own flash kernel (``torch.nn.attention.varlen``, which also returns lse).

What a GPU without the flash-attn package runs. Needs torch 2.13's ``block_table`` argument. Ranges of keys go to the
torch implementation: torch documents lse as ``[T, H]``, and its shape function says ``[H, T]``. Not run on the
project's CPU machines: the tests there check the arguments against torch's documented meaning.
"""

import torch

from longctx.attention.batch import AttentionShape, PackedBatch
from longctx.attention.flash_paged import FlashPagedAttention, refuse_without_gpu, window_size

AMPERE = (8, 0)  # the first GPU generation that the kernel runs on


class TorchFlashAttention(FlashPagedAttention):
    """GPU from the Ampere generation on, float16 and bfloat16."""

    name = "torch_flash"

    def __init__(self) -> None:
        from torch.nn.attention.varlen import varlen_attn

        self._varlen = varlen_attn
        self._batch: PackedBatch | None = None
        self._cu_seqlens_k = torch.empty(0)

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        reason = refuse_without_gpu(device, dtype, head_dim)
        if reason is None and torch.cuda.get_device_capability(device) < AMPERE:
            return "the GPU is older than the Ampere generation"
        return reason

    def attend(self, q_THD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        k_pages, v_pages = batch.pool.views(shape.layer_idx)
        if batch is not self._batch:
            self._batch = batch
            self._cu_seqlens_k = torch.nn.functional.pad(batch.kv_lens_B.cumsum(0, dtype=torch.int32), (1, 0))
        out_THD = self._varlen(
            q_THD,
            k_pages,
            v_pages,
            batch.cu_seqlens_B1,
            self._cu_seqlens_k,
            batch.max_q_len,
            batch.max_kv_len,
            scale=shape.scale,
            window_size=window_size(shape),
            enable_gqa=shape.num_heads != shape.num_kv_heads,
            seqused_k=batch.kv_lens_B,
            block_table=batch.block_tables_BP,
        )
        assert isinstance(out_THD, torch.Tensor)
        return out_THD.flatten(1)
