"""How the KV of one model lies in a page.

A *page* holds ``page_size`` consecutive tokens of one sequence, all layers. A *block* is one layer's part of a page:
contiguous bytes, K first, then V, then the key of the page's landmark if there is one, ``[num_kv_heads, head_dim]``:
whoever gets a page has what finds it. Attention backends declare which ``order`` they read:

- ``hnd``: K and V as ``[num_kv_heads, page_size, head_dim]``;
- ``nhd``: K and V as ``[page_size, num_kv_heads, head_dim]`` (flash-attn's paged layout);
- ``paired``: K as ``[num_kv_heads, head_dim / p, page_size, p]`` and V as ``[num_kv_heads, page_size / p, head_dim,
  p]`` where p values fill 4 bytes (p = 2 for bfloat16, 1 for float32): what a dot-product instruction takes without
  shuffles.
"""

import hashlib
from dataclasses import dataclass

ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
ORDERS = ("hnd", "nhd", "paired")
MIN_CACHE = 16  # blocks of a layer that fit near at least, where pages lie below


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape, element type and order of KV pages; two workers can exchange pages when their digests are equal."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int  # tokens
    dtype: str  # a key of ELEMENT_SIZES
    order: str  # one of ORDERS
    has_landmark: bool = False  # of landmark attention

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT_SIZES:
            raise ValueError(f"KV dtype {self.dtype!r} is unknown; allowed: {', '.join(ELEMENT_SIZES)}")
        if self.order not in ORDERS:
            raise ValueError(f"KV order {self.order!r} is unknown; allowed: {', '.join(ORDERS)}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one KV head's key of one token."""
        return self.head_dim * ELEMENT_SIZES[self.dtype]

    @property
    def head_bytes(self) -> int:
        """Bytes of one KV head's keys of one layer of one page."""
        return self.page_size * self.row_bytes

    @property
    def v_offset(self) -> int:
        """Where in a block V begins."""
        return self.num_kv_heads * self.head_bytes

    @property
    def landmark_bytes(self) -> int:
        """Bytes of the key of one page's landmark in one layer; 0 if there is none."""
        return self.num_kv_heads * self.row_bytes if self.has_landmark else 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one layer of one page."""
        return 2 * self.v_offset + self.landmark_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers."""
        return self.num_layers * self.block_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's KV, all layers."""
        return self.page_bytes // self.page_size

    def num_pages(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def digest(self) -> str:
        """16 hex digits that differ between layouts that cannot exchange pages."""
        text = repr((self.num_layers, self.num_kv_heads, self.head_dim, self.page_size, self.dtype, self.order))
        text += " landmark" if self.has_landmark else ""
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
