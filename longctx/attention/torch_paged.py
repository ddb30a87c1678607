"""Paged attention in plain torch: gathers each sequence's pages and calls scaled-dot-product attention.

The reference that every other implementation is compared with, and what runs where no compiler is at hand. It copies
the KV of every sequence in every layer of every step; ``native`` does not.
"""

import torch
import torch.nn.functional as F

from longctx.attention.backend import AttentionBackend
from longctx.attention.batch import AttentionShape, PackedBatch


class TorchPagedAttention(AttentionBackend):
    """Any device, any head size, float32, bfloat16 and float16."""

    name = "torch"
    kv_order = "hnd"
    page_sizes = ()

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def store(self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> None:
        k_pages, v_pages = batch.pool.views(shape.layer_idx)  # [num_pages, K, page_size, D]
        page_size = batch.pool.layout.page_size
        page, offset = batch.slots_T // page_size, batch.slots_T % page_size
        k_pages[page, :, offset] = k_TKD.to(k_pages.dtype)
        v_pages[page, :, offset] = v_TKD.to(v_pages.dtype)

    def attend(self, q_THD: torch.Tensor, shape: AttentionShape, batch: PackedBatch) -> torch.Tensor:
        k_pages, v_pages = batch.pool.views(shape.layer_idx)
        borders, kv_lens = batch.cu_seqlens_B1.tolist(), batch.kv_lens_B.tolist()
        outs = []
        for segment, kv_len in enumerate(kv_lens):
            start, stop = borders[segment], borders[segment + 1]
            table = batch.block_tables_BP[segment, : batch.pool.layout.num_pages(kv_len)].long()
            k, v = (pages[table].transpose(0, 1).flatten(1, 2)[:, :kv_len] for pages in (k_pages, v_pages))
            q = q_THD[start:stop].transpose(0, 1)
            outs.append(_attend_one(q, k.to(q.dtype), v.to(q.dtype), shape).transpose(0, 1).flatten(1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend_one(q_HQD: torch.Tensor, k_KSD: torch.Tensor, v_KSD: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
    """Attention of the last Q positions of one sequence of S keys; ``[H, Q, D]``."""
    num_queries, num_keys = q_HQD.shape[1], k_KSD.shape[1]
    mask = None
    causal = num_queries == num_keys and shape.window is None
    if not causal and (num_queries > 1 or shape.window is not None):
        query_idx = torch.arange(num_keys - num_queries, num_keys, device=q_HQD.device)[:, None]
        key_idx = torch.arange(num_keys, device=q_HQD.device)[None, :]
        mask = key_idx <= query_idx
        if shape.window is not None:
            mask &= query_idx - key_idx < shape.window
    return F.scaled_dot_product_attention(
        q_HQD[None], k_KSD[None], v_KSD[None], attn_mask=mask, is_causal=causal, scale=shape.scale, enable_gqa=True
    )[0]
