"""Stored prefixes of a worker of several ranks: each saves and loads its own pages, rank 0 says which.

A page lies on one rank, whole, and its file is any rank's: what two ranks saved, one or three find. Which rank a page
is on may be another for every prompt, so all ranks have to see one folder.

    save   a page of rank 0 at once; of another rank with the next step (``Step.saves``), or after a second without one
    load   rank 0 looks which files there are. If there are any, an errand, a step in which nothing is computed, says
           where they go. Each rank loads its own until one is missing or damaged and answers how far it came; behind
           the first page that any rank lacks, nothing counts as loaded.

A step without stored pages costs no message more. The errand does first what was to be done before the next step:
a page that is loaded may still be a copy's source.
"""

import time
from collections.abc import Sequence

from longctx.shards.runner import ShardRunner
from memory.prefix_store import PrefixStore
from memory.sharded_pages import ShardedPages


class ShardedStore:
    """The ``PageStore`` of rank 0's cache.

    Args:
        own: rank 0's store.
        pages: of all ranks.
        runner: reaches the others.
    """

    def __init__(self, own: PrefixStore, pages: ShardedPages, runner: ShardRunner) -> None:
        self._own, self._pages, self._runner = own, pages, runner
        self._others: list[list[int]] = []  # what the other ranks had counted at the last errand

    @property
    def is_worthwhile(self) -> bool:
        """See ``PrefixStore``; a load counts with its messages."""
        return self._own.is_worthwhile

    def count_pages(self) -> dict[str, int]:
        """See ``PrefixStore``; of all ranks, of the others as they were when pages were loaded last."""
        own = self._own.count_pages()
        return {what: sum(counts) for what, *counts in zip(own, own.values(), *self._others, strict=True)}

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """See ``PrefixStore``."""
        self._own.note_computed(num_tokens, seconds)

    def note_used(self, digests: Sequence[bytes]) -> None:
        """See ``PrefixStore``; rank 0 notes it in all files."""
        self._own.note_used(digests)

    def save(self, digests: Sequence[bytes], pages: Sequence[int]) -> None:
        """See ``PrefixStore``; pages as rank 0 numbers them."""
        for digest, page in zip(digests, pages, strict=True):
            if self._pages.rank_of(page) == 0:
                self._own.save([digest], [page])
            elif not self._own.knows(digest):
                self._own.note_known(digest)
                self._pages.save(page, digest)

    def load(self, digests: Sequence[bytes], pages: Sequence[int]) -> int:
        """See ``PrefixStore``. Raises ``ExchangeError`` if a rank is lost."""
        count = self._own.count(digests)
        if not count:
            return 0
        begun = time.perf_counter()
        rows = self._runner.run_errand(tuple(zip(pages[:count], digests[:count], strict=True)))
        self._others = [counts for _, *counts in rows[1:]]
        num_loaded = min(found for found, *_ in rows)
        self._own.note_loaded(num_loaded, time.perf_counter() - begun)
        for digest in digests[:num_loaded]:
            self._own.note_known(digest)
        self._pages.note_arrived(pages[:num_loaded], num_loaded)
        return num_loaded

    def close(self) -> None:
        """See ``PrefixStore``; the other ranks close theirs when they are let go."""
        self._own.close()
