"""Scheduling under CCA attention: a sequence's pages follow its window instead of growing with its prompt.

A prompt takes, when it starts, the pages of all its cores and as many as its nearest tokens and one chunk ever need;
chunk by chunk, what no coming token sees holds the next tokens. What is left over goes back when the prompt is
computed. So a prompt that has started always comes to its end, as without CCA. Where groups are fetched, pages are
copied below as they leave the window, to places that a prompt takes when it starts as well. No page of the pool is
found by its content: what a page of cores holds depends on both sizes, and pages of tokens are gone when the next
prompt comes. In a folder they are found (``memory/core_prefixes.py``).
"""

from collections.abc import Callable

from longctx.engine.core_rows import CoreRows
from longctx.engine.scheduler import LOADED_BYTES, Chunk, Scheduler
from longctx.engine.sequence import Sequence
from longctx.messages import GenerationRequest
from memory.core_pages import CoreCapacity, CorePages, CoreSizes
from memory.core_prefixes import CorePrefixes, CoreSearch
from memory.lower_pages import LowerPages
from memory.pages import PagePool
from memory.prefix_cache import DigestChain, PageStore, PrefixCache
from memory.prefix_store import PrefixStore


class CoreScheduler(Scheduler):
    """As ``Scheduler``.

    Args:
        cache: gives and takes pages; not enabled.
        rows: the decoding sequences.
        max_batch_tokens, max_sequences, mixed_share: as there.
        capacity: how many pages sequences need.
        sizes_of: groups and windows of a request that was checked.
        below: where pages are kept that leave the window; None: they are not.
    """

    rows: CoreRows

    def __init__(
        self,
        cache: PrefixCache,
        rows: CoreRows,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        mixed_share: float = 0.25,
        capacity: CoreCapacity,
        sizes_of: Callable[[GenerationRequest], CoreSizes],
        below: LowerPages | None = None,
    ) -> None:
        assert not cache.enabled
        super().__init__(
            cache, rows, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, mixed_share=mixed_share
        )
        self._capacity, self._sizes_of, self._below = capacity, sizes_of, below
        self._prefixes: CorePrefixes | None = None
        self._searches: dict[Sequence, CoreSearch] = {}  # of prompts whose prefix is being loaded

    def use_store(self, store: PageStore) -> None:
        super().use_store(store)
        pool = self.cache.pool
        assert isinstance(pool, PagePool) and isinstance(store, PrefixStore)
        self._prefixes = CorePrefixes(store, pool, self._below, core_stride=self._capacity.core_stride)

    def count_pages(self, request: GenerationRequest) -> int:
        return self._capacity.count_pages(self._sizes_of(request), len(request.prompt_token_ids))

    def allocate(self, sequence: Sequence) -> bool:
        sizes, num_tokens = self._sizes_of(sequence.active.request), sequence.num_tokens
        num_cores = self._capacity.count_core_pages(sizes, num_tokens)
        num_pages = self._capacity.count_pages(sizes, num_tokens)
        if self.cache.num_available < num_pages + len(self.rows.sequences):  # a spare page for each that decodes
            return False
        kept = self._allocate_below(sizes, num_tokens)
        if kept is None:
            return False
        pages = self.cache.pool.allocate(num_pages)
        assert pages is not None
        sequence.cores = CorePages(sizes, pages[:num_cores], pages[num_cores:], kept=kept)
        sequence.pages, sequence.num_computed, sequence.num_remembered = [], 0, 0
        if self._prefixes is not None:
            self._extend_chain(sequence, num_tokens)
            self._searches[sequence] = CoreSearch()
        return True

    def reserve(self, sequence: Sequence) -> tuple[int, list[int]] | None:
        sizes, num_tokens = self._sizes_of(sequence.active.request), sequence.num_tokens
        num_cores = self._capacity.count_core_pages(sizes, num_tokens)
        num_passed = sizes.first_token(num_tokens) // self._layout.page_size
        num_pages = num_cores + self._layout.num_pages(num_tokens) - num_passed
        if self.cache.num_available < num_pages + len(self.rows.sequences):
            return None
        kept = self._allocate_below(sizes, num_tokens)
        if kept is None:
            return None
        pages = self.cache.pool.allocate(num_pages)
        assert pages is not None
        sequence.cores = CorePages(sizes, pages[:num_cores], [], num_passed, kept)
        sequence.pages, sequence.num_computed, sequence.num_remembered = pages[num_cores:], 0, 0
        return 0, sequence.cores.lasting(sequence.pages, num_tokens, self._layout.page_size)

    def take_over(self, sequence: Sequence) -> None:
        cores, num_tokens = sequence.cores, sequence.num_tokens
        assert cores is not None
        pages = cores.lasting(sequence.pages, num_tokens, self._layout.page_size)
        (self._below or self.cache.pool).note_arrived(pages, 0)
        sequence.num_computed, sequence.num_remembered = num_tokens, num_tokens // self._layout.page_size

    def remember(self, sequence: Sequence) -> None:
        """Save what is complete, and give back what a sequence whose tokens are all computed no longer needs.

        What is sent to another worker stays where it is: also pages that have left the window, if they travel.
        """
        cores = sequence.cores
        self._save(sequence)
        if cores is None or sequence.row >= 0 or sequence.num_computed < sequence.num_tokens:
            return
        if self._below is None or sequence.active.export is None:
            self._pass_pages(sequence, sequence.num_computed)
        self._release(cores.spare)
        cores.spare = []

    def fork_pages(self, source: Sequence, target: Sequence) -> bool:
        """Share full pages, of cores and of tokens, and copy partial ones; False if no page is left for these."""
        cores = source.cores
        assert cores is not None
        size, pool = self._layout.page_size, self.cache.pool
        num_full = source.num_computed // size - cores.num_passed
        num_full_cores = self._capacity.core_stride * (cores.sizes.num_cores(source.num_computed) // size)
        partial = source.pages[num_full:] + cores.cores[num_full_cores:]
        fresh = pool.allocate(len(partial), beside=partial)
        if fresh is None:
            return False
        for old, new in zip(partial, fresh, strict=True):
            pool.copy_page(old, new)
        shared, shared_cores = source.pages[:num_full], cores.cores[:num_full_cores]
        pool.retain(shared + shared_cores)
        num_fresh = len(source.pages) - num_full
        target.pages = shared + fresh[:num_fresh]
        target.cores = CorePages(cores.sizes, shared_cores + fresh[num_fresh:], [], cores.num_passed, list(cores.kept))
        if self._below is not None:
            self._below.retain(cores.kept)
        target.num_computed, target.num_remembered = source.num_computed, source.num_remembered
        target.chain = source.chain and source.chain.fork()
        return True

    def drop(self, sequence: Sequence) -> None:
        self._save(sequence)
        self._searches.pop(sequence, None)
        if self.cache.store is not None and sequence.chain is not None and sequence.cores is not None:
            self.cache.store.note_used(sequence.chain.digests[: sequence.num_computed // self._layout.page_size])
        cores, sequence.cores = sequence.cores, None
        super().drop(sequence)
        if cores is not None:
            self._release(cores.cores + cores.spare)
            if self._below is not None:
                self._below.reclaim(self._below.release(cores.kept))

    def _grow_decodes(self) -> None:
        """Pages for tokens and cores that begin one; those that left a window go back first."""
        for sequence in sorted(self.rows.at_change(), key=lambda s: s.key):
            if sequence.row < 0:  # preempted for an earlier one
                continue
            self._save(sequence)
            if not self._pass_decode(sequence):
                continue
            if self.rows.lacks_page(sequence):
                page = self._take_page(sequence)
                if page is None:
                    continue
                self.rows.add_page(sequence, page)
            while self.rows.lacks_core_page(sequence):
                page = self._take_page(sequence)
                if page is None:
                    break
                self.rows.add_core_page(sequence, page)

    def _pass_decode(self, sequence: Sequence) -> bool:
        """Give the pages back that left a decoding sequence's window; False if it was preempted for want of room."""
        count, cores = self.rows.num_passing(sequence), sequence.cores
        if not count:
            return True
        assert cores is not None
        if self._below is not None:
            kept = self._take_from(self._below, count, sequence)
            if kept is None:
                return False
            cores.kept += kept
            self._keep_below(sequence, count)
        self._release(self.rows.pass_pages(sequence, count))
        return True

    def _allocate_below(self, sizes: CoreSizes, num_tokens: int) -> list[int] | None:
        """Places for all pages that so many tokens leave behind them; None if there are too few."""
        if self._below is None:
            return []
        count = sizes.first_token(num_tokens) // self._layout.page_size
        if self._below.num_free < count + len(self.rows.sequences):
            return None
        return self._below.allocate(count)

    def _keep_below(self, sequence: Sequence, count: int) -> None:
        """Copy the first pages to the places that there are for them."""
        cores = sequence.cores
        if self._below is not None and count:
            assert cores is not None
            self._below.keep(sequence.pages[:count], cores.kept[cores.num_passed : cores.num_passed + count])

    def _extend_chain(self, sequence: Sequence, num_tokens: int) -> None:
        """Name the full pages of so many tokens."""
        assert sequence.cores is not None
        if sequence.chain is None:
            sizes = sequence.cores.sizes
            salt = f"cca {sizes.group_size} {sizes.window}\0{sequence.active.request.cache_salt}"
            sequence.chain = DigestChain(self._layout.page_size, salt)
        sequence.chain.extend(sequence.token_ids(sequence.chain.num_tokens, num_tokens))

    def _save(self, sequence: Sequence) -> None:
        """Save the sequence's pages that became complete, with the cores of the groups that ended in them."""
        first, num_full = sequence.num_remembered, sequence.num_computed // self._layout.page_size
        if self._prefixes is None or sequence.cores is None or num_full <= first:
            return
        self._extend_chain(sequence, num_full * self._layout.page_size)
        assert sequence.chain is not None
        self._prefixes.save(sequence.chain.digests[first:num_full], first, sequence.cores, sequence.pages)
        sequence.num_remembered = num_full

    def _adopt_shared(self, sequence: Sequence) -> bool:
        """Load what is stored of a prompt's prefix, before anything of it is computed; a part in each step."""
        search, cores, store = self._searches.get(sequence), sequence.cores, self.cache.store
        if search is None:
            return False
        assert cores is not None and store is not None and sequence.chain is not None and self._prefixes is not None
        digests = sequence.chain.digests[: (sequence.num_tokens - 1) // self._layout.page_size]
        if store.is_worthwhile:
            self._prefixes.search(search, digests, cores, max_bytes=LOADED_BYTES)
            if not search.is_over:
                return True
        del self._searches[sequence]
        sequence.pages = self._prefixes.finish(search, digests, cores)
        sequence.num_remembered = search.num_found
        sequence.num_computed = search.num_found * self._layout.page_size
        if not sequence.outputs and not sequence.num_preemptions:
            sequence.active.num_cached_tokens = sequence.num_computed
        return False

    def _add_chunk(self, chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        added = super()._add_chunk(chunks, sequence, min(budget, self._capacity.chunk_size))
        if added:
            self._hold_chunk(chunks[-1])
        return added

    def _hold_chunk(self, chunk: Chunk) -> None:
        """Make room for a chunk's tokens in pages that its sequence has."""
        sequence, cores = chunk.sequence, chunk.sequence.cores
        assert cores is not None
        self._pass_pages(sequence, chunk.start)
        missing = self._layout.num_pages(chunk.stop) - cores.num_passed - len(sequence.pages)
        assert missing <= len(cores.spare)
        sequence.pages += cores.spare[:missing]
        del cores.spare[:missing]

    def _pass_pages(self, sequence: Sequence, position: int) -> None:
        """Pages before what the token at ``position`` sees become spare ones."""
        cores = sequence.cores
        assert cores is not None
        count = cores.sizes.first_token(position) // self._layout.page_size - cores.num_passed
        self._keep_below(sequence, count)
        cores.spare += sequence.pages[:count]
        del sequence.pages[:count]
        cores.num_passed += count

    def _release(self, pages: list[int]) -> None:
        if pages:
            self.cache.release(pages)
            self.is_blocked = False
