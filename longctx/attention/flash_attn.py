"""Paged attention through the flash-attn package: the variable-length kernel for prefill, the KV-cache one for decode.

Ranges of keys go to the KV-cache kernel where each segment is one row that sees keys from the first on, which is what
decode over a sharded sequence asks for; to the torch implementation where not.

Written for flash-attn 2.6 and later (paged ``block_table`` arguments). Not run on the project's CPU machines: the tests
there check the arguments against the package's documented meaning.
"""

import math
from importlib import import_module
from importlib.util import find_spec

import torch

from longctx.attention.batch import AttentionShape, KeyRanges, PackedBatch
from longctx.attention.gpu_paged import GPUPagedAttention, refuse_without_gpu, window_size
from memory.pages import PagePool


class FlashAttention(GPUPagedAttention):
    """GPU, float16 and bfloat16, needs the flash-attn package (``pip install longctx[gpu]``)."""

    name = "flash_attn"
    page_sizes = (256, 512)  # the kernels take multiples of 256

    def __init__(self) -> None:
        package = import_module("flash_attn")
        self._varlen, self._with_kvcache = package.flash_attn_varlen_func, package.flash_attn_with_kvcache
        self._batch: PackedBatch | None = None
        self._cu_seqlens_k = torch.empty(0)
        self._ranges: KeyRanges | None = None
        self._kv_lens_S: torch.Tensor | None = None

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

    def attend_ranges(
        self,
        q_SHD: torch.Tensor,
        shape: AttentionShape,
        ranges: KeyRanges,
        pool: PagePool,
        *,
        first_kv_head: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if ranges is not self._ranges:  # once for all layers: it waits for the GPU
            self._ranges, self._kv_lens_S = ranges, _kv_lens_of_decode(ranges)
        if self._kv_lens_S is None:
            return super().attend_ranges(q_SHD, shape, ranges, pool, first_kv_head=first_kv_head)
        heads = slice(first_kv_head, first_kv_head + shape.num_kv_heads)
        k_pages, v_pages = (pages[:, :, heads] for pages in pool.views(shape.layer_idx))
        out_S1HD, lse_SH1 = self._with_kvcache(
            q_SHD.unsqueeze(1),
            k_pages,
            v_pages,
            cache_seqlens=self._kv_lens_S,
            block_table=ranges.block_tables_BP,
            softmax_scale=shape.scale,
            causal=False,
            return_softmax_lse=True,
        )
        is_empty_S1 = self._kv_lens_S[:, None] == 0  # what the kernel returns for these is not documented
        out_SHD = out_S1HD.squeeze(1).float().masked_fill(is_empty_S1[..., None], 0.0)
        return out_SHD, lse_SH1.squeeze(2).float().masked_fill(is_empty_S1, -math.inf)


def _kv_lens_of_decode(ranges: KeyRanges) -> torch.Tensor | None:
    """int32 ``[S]``, how many keys each row sees, if each is a segment of its own and sees keys from the first on."""
    seen_S = ranges.first_S < ranges.last_S
    if len(seen_S) != len(ranges.cu_seqlens_B1) - 1:
        return None
    is_decode = (ranges.cu_seqlens_B1.diff() == 1).all() & ~(seen_S & (ranges.first_S > 0)).any()
    return ranges.last_S * seen_S if is_decode else None
