"""Paged attention through the flash-attn package: the variable-length kernel for prefill, the KV-cache one for decode.

Written for flash-attn 2.6 and later (paged ``block_table`` arguments). Not run on the project's CPU machines: the tests
there check the arguments against the package's documented meaning.
"""

from importlib import import_module
from importlib.util import find_spec

import torch

from longctx.attention.batch import AttentionShape, PackedBatch
from longctx.attention.flash_paged import FlashPagedAttention, refuse_without_gpu, window_size


class FlashAttention(FlashPagedAttention):
    """GPU, float16 and bfloat16, needs the flash-attn package (``pip install longctx[gpu]``)."""

    name = "flash_attn"

    def __init__(self) -> None:
        package = import_module("flash_attn")
        self._varlen, self._with_kvcache = package.flash_attn_varlen_func, package.flash_attn_with_kvcache
        self._batch: PackedBatch | None = None
        self._cu_seqlens_k = torch.empty(0)

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if find_spec("flash_attn") is None:
            return "the flash-attn package is not installed (extra longctx[gpu])"
        return refuse_without_gpu(device, dtype, head_dim)

    def attend(self, q_THD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        k_pages, v_pages = batch.pool.views(shape.layer_idx)
        window = window_size(shape)
        if batch.max_q_len == 1:
            out_B1HD = self._with_kvcache(
                q_THD.unsqueeze(1),
                k_pages,
                v_pages,
                cache_seqlens=batch.kv_lens_B,
                block_table=batch.block_tables_BP,
                softmax_scale=shape.scale,
                causal=True,
                window_size=window,
            )
            return out_B1HD.flatten(1)
        if batch is not self._batch:
            self._batch = batch
            self._cu_seqlens_k = torch.nn.functional.pad(batch.kv_lens_B.cumsum(0, dtype=torch.int32), (1, 0))
        out_THD = self._varlen(
            q_THD,
            k_pages,
            v_pages,
            cu_seqlens_q=batch.cu_seqlens_B1,
            cu_seqlens_k=self._cu_seqlens_k,
            max_seqlen_q=batch.max_q_len,
            max_seqlen_k=batch.max_kv_len,
            softmax_scale=shape.scale,
            causal=True,
            window_size=window,
            block_table=batch.block_tables_BP,
        )
        return out_THD.flatten(1)
