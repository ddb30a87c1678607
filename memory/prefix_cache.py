"""Pages found again by their content: equal prompt prefixes share KV.

Every full page has a digest chained over the tokens before it: ``digest(i) = blake2b(digest(i - 1) + token ids of page
i)``, with the salt at the root, so one digest names a whole prefix. A page that somebody holds and that is in the cache
is shared; one that nobody holds any more stays *idle* and is evicted when the pool runs out, in the order of a policy
(``memory/eviction.py``).

The cache sits between the pool and its users: they release pages here, never at the pool. With a ``store`` below,
complete pages are saved there too, and come from there when the pool has them no more. Left out: sharing parts of a
page.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from memory.eviction import EVICTIONS, Eviction
from memory.pages import PageAllocator

DIGEST_BYTES = 16


class DigestChain:
    """Digests of the full pages of one sequence, made as its tokens become known."""

    __slots__ = ("_page_size", "_root", "digests")

    def __init__(self, page_size: int, salt: str = "") -> None:
        self._page_size = page_size
        self._root = hashlib.blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()
        self.digests: list[bytes] = []

    @property
    def num_tokens(self) -> int:
        """Tokens covered so far."""
        return len(self.digests) * self._page_size

    def extend(self, token_ids: npt.NDArray[np.int64]) -> None:
        """Add the full pages of ``token_ids``, which follow the first ``num_tokens`` tokens; the rest is ignored."""
        digests, step = self.digests, self._page_size * 8
        data = memoryview(token_ids.astype(np.int64, copy=False).tobytes())
        digest = digests[-1] if digests else self._root
        for start in range(0, len(data) - step + 1, step):
            digest = hashlib.blake2b(digest + data[start : start + step], digest_size=DIGEST_BYTES).digest()
            digests.append(digest)

    def fork(self) -> "DigestChain":
        """A chain over the same tokens that grows on its own."""
        chain = DigestChain.__new__(DigestChain)
        chain._page_size, chain._root, chain.digests = (self._page_size, self._root, self.digests.copy())
        return chain


class PageStore(Protocol):
    """What keeps pages below a pool: ``PrefixStore``, or ``longctx.shards.prefixes.ShardedStore`` over ranks."""

    @property
    def is_worthwhile(self) -> bool:
        """Whether loading a page is faster than computing it, as far as is known."""
        ...

    def count_pages(self) -> dict[str, int]:
        """Of pages since the start, by what became of them: loaded, saved, dropped, damaged."""
        ...

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """A step computed so many tokens of prompts."""
        ...

    def note_used(self, digests: Sequence[bytes]) -> None:
        """A sequence with these pages, in its order, has ended, or gave them up."""
        ...

    def save(self, digests: Sequence[bytes], pages: Sequence[int]) -> None:
        """Pages are complete and held; what they hold now is to be found again."""
        ...

    def load(self, digests: Sequence[bytes], pages: Sequence[int]) -> int:
        """Fill pages; returns how many of the first ones were there."""
        ...

    def close(self) -> None:
        """Write what waits. Idempotent."""
        ...


class PrefixCache:
    """Shared and idle pages of one pool, by digest.

    Args:
        pool: whose pages; the cache becomes its ``evict``.
        enabled: False remembers nothing, and pages become free as soon as nobody holds them.
        eviction: which idle page goes first, a name of ``EVICTIONS``.

    Not thread-safe: used from the engine's thread, as the pool is.
    """

    def __init__(self, pool: PageAllocator, *, enabled: bool = True, eviction: str = "lru") -> None:
        self.pool = pool
        self.enabled = enabled
        self.store: PageStore | None = None
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: Eviction = EVICTIONS.get(eviction)()
        pool.evict = self.evict

    @property
    def num_idle(self) -> int:
        """Pages nobody holds that can still be found."""
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """Pages that ``pool.allocate`` can give: free and idle ones."""
        return self.pool.num_free + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages somebody holds."""
        return self.pool.num_pages - self.num_available

    def count(self, digests: Sequence[bytes]) -> int:
        """How many pages ``match`` would find; takes none."""
        return next((idx for idx, digest in enumerate(digests) if digest not in self._page_of), len(digests))

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix of ``digests``; the caller holds them from now on.

        Leave out the page with a prompt's last token: at least one token must be computed to have logits.
        """
        pages: list[int] = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._idle.take(page)
            pages.append(page)
        self.pool.retain(pages)
        return pages

    def insert(self, digests: Sequence[bytes], pages: Sequence[int]) -> None:
        """Remember held, complete pages; a digest that is known keeps the page it has."""
        if not self.enabled:
            return
        for digest, page in zip(digests, pages, strict=True):
            if digest not in self._page_of and page not in self._digest_of:
                self._page_of[digest] = page
                self._digest_of[page] = digest
                self._idle.begin(page)
        if self.store is not None:
            self.store.save(digests, pages)

    def load(self, digests: Sequence[bytes], pages: Sequence[int]) -> int:
        """Fill held pages that are still to be computed from the store; returns how many of the first ones are."""
        if self.store is None or not self.store.is_worthwhile:
            return 0
        return self.store.load(digests, pages)

    def release(self, pages: Sequence[int]) -> None:
        """Give up one hold on each of a sequence's pages (in sequence order)."""
        if self.store is not None:
            self.store.note_used([self._digest_of[page] for page in pages if page in self._digest_of])
        # Last page first, so that it goes first, as eviction policies expect.
        unknown = []
        for page in self.pool.release(list(reversed(pages))):
            if page in self._digest_of:
                self._idle.add(page)
            else:
                unknown.append(page)
        self.pool.reclaim(unknown)

    def evict(self, num_pages: int) -> int:
        """Forget up to ``num_pages`` idle pages and make them free; returns how many."""
        count = min(num_pages, len(self._idle))
        evicted = [self._idle.pop() for _ in range(count)]
        for page in evicted:
            del self._page_of[self._digest_of.pop(page)]
        self.pool.reclaim(evicted)
        return count

    def clear(self) -> None:
        """Forget every page; held ones stay with their holders."""
        self.evict(len(self._idle))
        self._page_of.clear()
        self._digest_of.clear()
