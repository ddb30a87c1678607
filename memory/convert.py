"""Blocks of one layout made into those of another, for workers whose KV differs in element type and order."""

from dataclasses import replace

import numpy as np
import torch

from memory.layout import ELEMENT_SIZES, KVLayout
from memory.pages import DTYPES


def can_convert(source: KVLayout, target: KVLayout) -> bool:
    """Whether the two differ in element type and order at most."""
    return replace(source, dtype=target.dtype, order=target.order) == target


def convert(blocks: np.ndarray, source: KVLayout, target: KVLayout) -> np.ndarray:
    """uint8 ``[num_bytes]`` of whole blocks in ``target``'s layout. Values are rounded if its elements are narrower.

    Raises ``ValueError`` if a value is too large for the target's element type.
    """
    rows = torch.from_numpy(blocks).view(-1, source.block_bytes)
    dtype = DTYPES[target.dtype]
    parts = []
    for is_value in (False, True):
        start = source.v_offset if is_value else 0
        values = rows[:, start : start + source.v_offset].contiguous().view(DTYPES[source.dtype])
        parts.append(_from_hnd(_to_hnd(values, source, is_value).to(dtype), target, is_value))
    if source.has_landmark:
        parts.append(rows[:, 2 * source.v_offset :].contiguous().view(DTYPES[source.dtype]).to(dtype))
    joined = torch.cat(parts, 1)
    if target.dtype == "float16" and not torch.isfinite(joined).all():
        raise ValueError("KV has values that float16, the receiver's element type, cannot hold")
    return joined.view(torch.uint8).view(-1).numpy()


def _to_hnd(values: torch.Tensor, layout: KVLayout, is_value: bool) -> torch.Tensor:
    """``[num_blocks, num_kv_heads, page_size, head_dim]`` of ``[num_blocks, v_offset elements]``."""
    heads, page, dim, pair = layout.num_kv_heads, layout.page_size, layout.head_dim, _pair(layout)
    if layout.order == "hnd":
        return values.view(-1, heads, page, dim)
    if layout.order == "nhd":
        return values.view(-1, page, heads, dim).transpose(1, 2)
    if is_value:
        return values.view(-1, heads, page // pair, dim, pair).transpose(3, 4).reshape(-1, heads, page, dim)
    return values.view(-1, heads, dim // pair, page, pair).transpose(2, 3).reshape(-1, heads, page, dim)


def _from_hnd(values: torch.Tensor, layout: KVLayout, is_value: bool) -> torch.Tensor:
    """The inverse of ``_to_hnd``."""
    heads, page, dim, pair = layout.num_kv_heads, layout.page_size, layout.head_dim, _pair(layout)
    if layout.order == "nhd":
        values = values.transpose(1, 2)
    elif layout.order == "paired" and is_value:
        values = values.reshape(-1, heads, page // pair, pair, dim).transpose(3, 4)
    elif layout.order == "paired":
        values = values.reshape(-1, heads, page, dim // pair, pair).transpose(2, 3)
    return values.reshape(len(values), -1)


def _pair(layout: KVLayout) -> int:
    """Elements in 4 bytes."""
    return 4 // ELEMENT_SIZES[layout.dtype]
