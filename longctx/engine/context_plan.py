"""What contexts cost with the attention method that they are served with: memory, products, reads. No torch here.

Pages are counted as engines count them. Products and reads are at best: what a token looks at in any case.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from longctx.attention.config import AttentionConfig
from longctx.engine.config import EngineConfig
from longctx.models.attention_spec import AttentionSpec, CCASpec, LandmarkSpec
from longctx.models.checkpoint import ModelSpec
from memory.core_pages import CoreCapacity, CoreSizes
from memory.layout import MIN_CACHE, KVLayout

MAX_TOKENS = 1 << 40  # above any context that fits anywhere
PAGE_SIZES = {"cpu": 64, "cuda": 256}  # that attention implementations prefer


class Sized(Protocol):
    """Sequences whose memory can be counted."""

    def count_bytes(self, num_tokens: int) -> Mapping[str, int]:
        """On each rank, for a sequence of so many tokens: ``kv`` near the compute, ``landmarks`` (their keys) if apart
        from it, ``blocks`` below."""
        ...


class Contexts(Sized, Protocol):
    """Sequences under one method, each on all ranks of a worker."""

    @property
    def layout(self) -> KVLayout:
        """Of their pages."""
        ...

    def count_least(self, engine: EngineConfig) -> int:
        """Bytes of ``kv`` that each rank has to have whatever contexts are."""
        ...

    def count_sent(self, num_tokens: int) -> int:
        """Bytes that a prefill worker ships of a prompt, from all its ranks."""
        ...

    def count_read(self, num_tokens: int) -> float:
        """Bytes that are read for one more token behind so many, on all ranks."""
        ...

    def count_flops(self, num_tokens: int) -> float:
        """Of attention over a prompt, all layers."""
        ...


def count_staging(engine: EngineConfig, page_size: int, *, sp_degree: int = 1) -> int:
    """Pages near the compute that may be filled at one time where full ones lie below, on each rank."""
    return -(-sp_degree * engine.max_batch_tokens // page_size) + 2 * engine.max_sequences


def find_longest(contexts: Sized, room: Mapping[str, int]) -> int:
    """Tokens of the longest sequence that :func:`count_held` finds room for."""
    return bisect_right(range(1, MAX_TOKENS), False, key=lambda length: count_held(contexts, room, length) == 0)


def count_held(contexts: Sized, room: Mapping[str, int], num_tokens: int) -> int:
    """Sequences of so many tokens that fit into the bytes of ``room``; parts that it does not name are not bounded."""
    needed = contexts.count_bytes(num_tokens)
    return min(room[part] // needed[part] for part in room if part in needed)


@dataclass(frozen=True, slots=True)
class DenseContexts:
    """Every token stays and sees all before it."""

    layout: KVLayout
    num_heads: int
    sp_degree: int

    def count_bytes(self, num_tokens: int) -> Mapping[str, int]:
        return {"kv": -(-num_tokens // self.sp_degree) * self.layout.token_bytes}

    def count_least(self, engine: EngineConfig) -> int:
        return 0

    def count_sent(self, num_tokens: int) -> int:
        return num_tokens * self.layout.token_bytes

    def count_read(self, num_tokens: int) -> float:
        return num_tokens * self.layout.token_bytes

    def count_flops(self, num_tokens: int) -> float:
        return 4 * _width(self) * num_tokens * (num_tokens + 1) / 2


@dataclass(frozen=True, slots=True)
class LandmarkContexts:
    """Every block stays, near or below; a token sees a landmark of each and the tokens of a few.

    Args:
        layout: of pages that are blocks.
        num_heads: query heads.
        sp_degree: ranks, which have different blocks and know all landmarks.
        top_k: blocks that a token retrieves.
        tier: ``near``, ``host`` or ``file``.
    """

    layout: KVLayout
    num_heads: int
    sp_degree: int
    top_k: int
    tier: str

    def count_bytes(self, num_tokens: int) -> Mapping[str, int]:
        num_pages = -(-self.layout.num_pages(num_tokens) // self.sp_degree)
        table = num_pages * self.sp_degree * self.layout.num_layers * self.layout.landmark_bytes
        if self.tier == "near":
            return {"kv": num_pages * self.layout.page_bytes + (table if self.sp_degree > 1 else 0)}
        if self.sp_degree > 1:
            table += table // self.sp_degree  # its own a second time
        return {"landmarks": table, "blocks": num_pages * self.layout.page_bytes}

    def count_least(self, engine: EngineConfig) -> int:
        if self.tier == "near":
            return 0
        num_staging = count_staging(engine, self.layout.page_size, sp_degree=self.sp_degree)
        return (num_staging + MIN_CACHE) * self.layout.page_bytes

    def count_sent(self, num_tokens: int) -> int:
        return self.layout.num_pages(num_tokens) * self.layout.page_bytes

    def count_read(self, num_tokens: int) -> float:
        layout = self.layout
        num_landmarks = num_tokens // layout.page_size
        num_blocks = min(self.top_k, num_landmarks) + 0.5  # its own is half full
        return layout.num_layers * (num_landmarks * layout.landmark_bytes + num_blocks * layout.block_bytes)

    def count_flops(self, num_tokens: int) -> float:
        size = self.layout.page_size
        landmarks = num_tokens**2 / (2 * size)
        seen = num_tokens * min(num_tokens / 2, (self.top_k + 0.5) * size)
        return _width(self) * (2 * landmarks + 4 * seen)


@dataclass(frozen=True, slots=True)
class CoreContexts:
    """Cores of all that was, and a window of tokens; each rank has all of it.

    Args:
        layout: of pages.
        num_heads: query heads.
        sizes: of groups and the window.
        chunk_size: tokens of a step.
        num_fetched: groups that each head of a token sees token by token: ``attention.core_fetch``.
    """

    layout: KVLayout
    num_heads: int
    sizes: CoreSizes
    chunk_size: int
    num_fetched: int

    def count_bytes(self, num_tokens: int) -> Mapping[str, int]:
        page_size = self.layout.page_size
        chunk = max(page_size, self.chunk_size - self.chunk_size % page_size)
        capacity = CoreCapacity(page_size, chunk, core_stride=2 if self.num_fetched else 1)
        near = {"kv": capacity.count_pages(self.sizes, num_tokens) * self.layout.page_bytes}
        if self.num_fetched:
            near["blocks"] = self.layout.num_pages(num_tokens) * self.layout.page_bytes
        return near

    def count_least(self, engine: EngineConfig) -> int:
        return 0

    def count_sent(self, num_tokens: int) -> int:
        cores, tokens = self._count_seen(num_tokens)
        if self.num_fetched:
            cores, tokens = 2 * cores, num_tokens
        return int(cores + tokens) * self.layout.token_bytes

    def count_read(self, num_tokens: int) -> float:
        cores, tokens = self._count_seen(num_tokens)
        if self.num_fetched:  # bounds are as large as cores
            cores, tokens = 2 * cores, tokens + min(self.num_fetched, cores) * self.sizes.group_size
        return (cores + tokens) * self.layout.token_bytes

    def count_flops(self, num_tokens: int) -> float:
        cores, tokens = self._count_seen(num_tokens)
        fetched = min(self.num_fetched, cores) * self.sizes.group_size + (cores / 2 if self.num_fetched else 0)
        return 4 * _width(self) * num_tokens * (cores / 2 + min(tokens, num_tokens / 2) + fetched)

    def _count_seen(self, num_tokens: int) -> tuple[int, int]:
        """Cores and tokens that one more token sees."""
        first = self.sizes.first_token(num_tokens)
        return first // self.sizes.group_size, num_tokens - first


def choose_contexts(
    spec: ModelSpec,
    method: AttentionSpec | None,
    engine: EngineConfig,
    attention: AttentionConfig,
    *,
    dtype: str,
    device_type: str,
    sp_degree: int,
) -> Contexts:
    """Sequences of a model as ``method`` serves them.

    Args:
        spec: the model.
        method: with the sizes that are used; None: dense.
        engine, attention: as configured.
        dtype: of KV.
        device_type: ``cpu`` or ``cuda``.
        sp_degree: ranks of a worker.
    """
    is_landmark = isinstance(method, LandmarkSpec)
    page_size = method.block_size if is_landmark else engine.page_size or PAGE_SIZES[device_type]
    shape = (spec.num_layers, spec.num_kv_heads, spec.head_dim, page_size, dtype, "hnd")
    layout = KVLayout(*shape, has_landmark=is_landmark)
    if is_landmark:
        return LandmarkContexts(layout, spec.num_heads, sp_degree, attention.top_k, attention.blocks)
    if isinstance(method, CCASpec):
        chunk_size = sp_degree * engine.max_batch_tokens
        sizes = CoreSizes(method.group_size, method.window)
        return CoreContexts(layout, spec.num_heads, sizes, chunk_size, attention.core_fetch)
    return DenseContexts(layout, spec.num_heads, sp_degree)


def _width(contexts: "DenseContexts | LandmarkContexts | CoreContexts") -> int:
    """Numbers of a query, all heads and layers."""
    return contexts.layout.num_layers * contexts.num_heads * contexts.layout.head_dim
