"""Which tokens the next step computes, and which pages hold them.

A step computes one token of every decoding sequence and fills up with chunks of prompts, first come, first served, but
for short ones: a prompt that needs less than half of what the oldest still needs has half of every step. A prompt gets
all its pages when it starts; a decoding sequence gets one more each time its last one is full. When none is left, the
sequence that arrived last gives its pages up and is computed again later, before all that arrived after it; one that
has done so several times is spared while others can.
"""

import logging
from bisect import insort
from dataclasses import dataclass

from longctx.engine.rows import DecodeRows
from longctx.engine.sequence import INDEPENDENT, RopeLengths, Sequence
from longctx.messages import GenerationRequest
from memory.pages import PageAllocator
from memory.prefix_cache import DigestChain, PageStore, PrefixCache

logger = logging.getLogger(__name__)

LOADED_BYTES = 64 << 20  # of stored pages in one step
MAX_PREEMPTIONS = 4  # of one sequence, while there is another to preempt


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``stop`` of one sequence, computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the sequence's next token is sampled from it."""
        return self.stop == self.sequence.num_tokens


class Scheduler:
    """Queues of sequences, and the pages they hold.

    Args:
        cache: gives and takes pages.
        rows: the decoding sequences.
        max_batch_tokens: tokens of one step, raised to a page where a page is larger.
        max_sequences: sequences that decode, or will once their prompt is computed, at one time.
        mixed_share: of those tokens that prompts get while sequences decode.
        rope_lengths: which sequences must not share pages, and when one is computed again.
    """

    def __init__(
        self,
        cache: PrefixCache,
        rows: DecodeRows,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        mixed_share: float = 0.25,
        rope_lengths: RopeLengths = INDEPENDENT,
    ) -> None:
        self.cache = cache
        self.rows = rows
        self.waiting: list[Sequence] = []  # hold no pages; in order of arrival
        self.prefilling: list[Sequence] = []  # hold all pages of their tokens; in order of arrival
        self.num_reserved_rows = 0  # rows for prompts computed elsewhere
        self.num_preemptions = 0
        self.is_blocked = False  # the first waiting sequence did not fit, and nothing was freed since
        self._layout = cache.pool.layout
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._mixed_tokens = int(max_batch_tokens * mixed_share)
        self._rope_lengths = rope_lengths

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self.rows.sequences or self.prefilling or (self.waiting and not self.is_blocked))

    @property
    def pending_prefill_tokens(self) -> int:
        """Tokens still to be computed before their sequences decode."""
        return sum(map(_missing, (*self.waiting, *self.prefilling)))

    def use_store(self, store: PageStore) -> None:
        """Keep pages of prefixes there, and look for them there."""
        self.cache.store = store

    def enqueue(self, sequence: Sequence) -> None:
        """Let a sequence without pages wait for its turn."""
        insort(self.waiting, sequence, key=_key)
        self.is_blocked = False

    def schedule(self) -> list[Chunk]:
        """Grow the decoding sequences, start waiting ones, and return the prompt chunks of this step."""
        if self._rope_lengths.restart_length is not None:
            self._restart_outgrown(self._rope_lengths.restart_length)
        self._grow_decodes()
        chunks: list[Chunk] = []
        if not self.prefilling and (self.is_blocked or not self.waiting):
            return chunks
        budget = self._prefill_budget()
        spent = self._add_short(chunks, budget // 2)
        has_chunk = {chunk.sequence for chunk in chunks}
        for sequence in self.prefilling:
            if sequence not in has_chunk:
                spent += self._add_chunk(chunks, sequence, budget - spent)
        while self.waiting and not self.is_blocked and (spent < budget or self._overtakes(self.waiting[0])):
            sequence = self.waiting[0]
            self.is_blocked = not self._admit(sequence)
            added = 0 if self.is_blocked else self._add_chunk(chunks, sequence, budget - spent)
            spent = spent + added if added else budget
        return chunks

    def has_rows(self, num_rows: int) -> bool:
        """Whether that many more sequences may decode."""
        pending = sum(_rows_wanted(s) for s in self.prefilling)
        return len(self.rows.sequences) + self.num_reserved_rows + pending + num_rows <= self._max_sequences

    def count_pages(self, request: GenerationRequest) -> int:
        """Pages that a request's prompt takes when it starts, if none is shared."""
        return self._layout.num_pages(len(request.prompt_token_ids))

    def allocate(self, sequence: Sequence) -> bool:
        """Give ``sequence`` pages for all its tokens, shared ones first; False, and none taken, if too few."""
        num_tokens, page_size = sequence.num_tokens, self._layout.page_size
        shared: list[int] = []
        self._start_chain(sequence)
        if sequence.chain is not None:
            sequence.chain.extend(sequence.token_ids(sequence.chain.num_tokens, num_tokens))
            shared = self.cache.match(sequence.chain.digests[: (num_tokens - 1) // page_size])
        num_fresh = self._layout.num_pages(num_tokens) - len(shared)
        # A spare page for each decoding sequence: else what is admitted now is preempted a few steps later.
        fresh = None
        if self.cache.num_available >= num_fresh + len(self.rows.sequences):
            fresh = self.cache.pool.allocate(num_fresh)
        if fresh is None:
            self.cache.release(shared)
            return False
        sequence.pages = shared + fresh
        sequence.num_remembered = len(shared)
        sequence.num_computed = len(shared) * page_size
        return True

    def reserve(self, sequence: Sequence) -> tuple[int, list[int]] | None:
        """Give ``sequence`` the pages of a prompt that is computed elsewhere; None, and none taken, if too few.

        Returns:
            The pages that are to be filled, in the order in which ``LayerAnnouncer`` tells of them, and how many are
            before them, which were found.
        """
        if not self.allocate(sequence):
            return None
        num_found = sequence.num_computed // self._layout.page_size
        return num_found, sequence.pages[num_found:]

    def take_over(self, sequence: Sequence) -> None:
        """The pages that were reserved hold the sequence's prompt."""
        page_size, num_tokens = self._layout.page_size, sequence.num_tokens
        num_found, sequence.num_computed = sequence.num_computed // page_size, num_tokens
        self.cache.pool.note_arrived(sequence.pages[num_found:], num_tokens // page_size - num_found)
        self.remember(sequence)

    def remember(self, sequence: Sequence) -> None:
        """Tell the prefix cache of the sequence's pages that became complete."""
        num_full, first = (sequence.num_computed // self._layout.page_size, sequence.num_remembered)
        if sequence.chain is None or num_full <= first:
            return
        chain = sequence.chain
        if len(chain.digests) < num_full:
            chain.extend(sequence.token_ids(chain.num_tokens, num_full * self._layout.page_size))
        self.cache.insert(chain.digests[first:num_full], sequence.pages[first:num_full])
        sequence.num_remembered = num_full

    def fork_pages(self, source: Sequence, target: Sequence) -> bool:
        """Share ``source``'s full pages with ``target`` and copy the partial one; False if no page is left for it."""
        num_full = source.num_computed // self._layout.page_size
        partial = source.pages[num_full:]
        fresh = self.cache.pool.allocate(len(partial), beside=partial)
        if fresh is None:
            return False
        for old, new in zip(partial, fresh, strict=True):
            self.cache.pool.copy_page(old, new)
        shared = source.pages[:num_full]
        self.cache.pool.retain(shared)
        target.pages = shared + fresh
        target.num_computed, target.num_remembered = (source.num_computed, source.num_remembered)
        target.chain, target.rope_floor = (source.chain and source.chain.fork(), source.rope_floor)
        return True

    def drop(self, sequence: Sequence) -> None:
        """Take the sequence out of every queue and give its pages up."""
        if sequence.row >= 0:
            self.rows.remove(sequence)
        elif sequence in self.prefilling:
            self.prefilling.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.remember(sequence)
        self.cache.release(sequence.pages)
        sequence.pages, sequence.num_computed, sequence.num_remembered = [], 0, 0
        self.is_blocked = False

    def _start_chain(self, sequence: Sequence) -> None:
        """Set what the sequence's pages may be shared by; a chain whose salt still holds is kept."""
        request, floor = sequence.active.request, sequence.rope_floor
        sequence.rope_floor = self._rope_lengths.floor(len(sequence.active.prompt), sequence.num_tokens)
        if self.cache.enabled and (sequence.chain is None or sequence.rope_floor != floor):
            salt = f"{self._rope_lengths.salt(sequence.rope_floor)}\0{request.cache_salt}"
            sequence.chain = DigestChain(self._layout.page_size, salt)

    def _restart_outgrown(self, restart_length: int) -> None:
        """Queue decoding sequences again that their KV has become invalid for by growing over ``restart_length``."""
        for sequence in list(self.rows.sequences):
            if sequence.num_computed == restart_length >= sequence.rope_floor:
                self.drop(sequence)
                self.enqueue(sequence)

    def _grow_decodes(self) -> None:
        """A page for each decoding sequence whose next token begins one."""
        for sequence in sorted(self.rows.at_page_start(), key=_key):
            if sequence.row < 0:  # preempted for an earlier one
                continue
            self.remember(sequence)
            page = self._take_page(sequence)
            if page is not None:
                self.rows.add_page(sequence, page)

    def _take_page(self, sequence: Sequence) -> int | None:
        """A page for a decoding sequence, at the expense of those that came last; None if that is itself."""
        pages = self._take_from(self.cache.pool, 1, sequence)
        return None if pages is None else pages[0]

    def _take_from(self, pool: PageAllocator, num_pages: int, sequence: Sequence) -> list[int] | None:
        """As ``_take_page``, several pages of any pool."""
        pages = pool.allocate(num_pages)
        while pages is None and sequence.row >= 0:
            self._preempt(self._latest())
            pages = None if sequence.row < 0 else pool.allocate(num_pages)
        return pages

    def _latest(self) -> Sequence:
        """The sequence to preempt. Exported prompts are not: somebody may be reading their pages."""
        candidates = self.rows.sequences + [s for s in self.prefilling if s.active.export is None]
        return max(candidates, key=lambda sequence: (sequence.num_preemptions < MAX_PREEMPTIONS, _key(sequence)))

    def _preempt(self, sequence: Sequence) -> None:
        logger.debug("preempting %s: no page is left", sequence.active.request_id)
        self.drop(sequence)
        self.enqueue(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _prefill_budget(self) -> int:
        num_decodes = len(self.rows.sequences)
        budget = self._max_batch_tokens - num_decodes
        if num_decodes:
            budget = min(budget, self._mixed_tokens)
        return max(budget, self._layout.page_size)

    def _overtakes(self, sequence: Sequence) -> bool:
        """Whether a prompt need not wait for the oldest, which is much longer."""
        return bool(self.prefilling) and 2 * _missing(sequence) < _missing(self.prefilling[0])

    def _add_short(self, chunks: list[Chunk], budget: int) -> int:
        """Append chunks of the prompts that overtake the oldest, shortest first; returns their number of tokens."""
        spent = 0
        for sequence in sorted(filter(self._overtakes, self.prefilling), key=_missing):
            spent += self._add_chunk(chunks, sequence, budget - spent)
        return spent

    def _admit(self, sequence: Sequence) -> bool:
        if not self.has_rows(_rows_wanted(sequence)) or not self.allocate(sequence):
            return False
        self.waiting.pop(0)
        if not sequence.outputs:  # what it had computed before it was preempted is found, but was not there before it
            found, known = sequence.num_computed, sequence.active.num_cached_tokens
            sequence.active.num_cached_tokens = min(found, known) if sequence.num_preemptions else found
        insort(self.prefilling, sequence, key=_key)
        return True

    def _add_chunk(self, chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        """Append the sequence's next chunk, as far as ``budget`` tokens go; returns its number of tokens.

        Chunks end where pages end, so that every page but a prompt's last is complete after one step.
        """
        if budget <= 0 or len(chunks) == self._max_sequences:
            return 0
        if self._adopt_shared(sequence):
            return 0
        start, num_tokens = sequence.num_computed, sequence.num_tokens
        stop = min(num_tokens, start + budget)
        if stop < num_tokens:
            stop -= stop % self._layout.page_size
        if stop <= start:
            return 0
        chunks.append(Chunk(sequence, start, stop))
        return stop - start

    def _adopt_shared(self, sequence: Sequence) -> bool:
        """Skip pages that another sequence with the same prefix completed since this one started, or that are stored.

        Returns whether there may be more stored ones, for the next step.
        """
        if sequence.chain is None or not self.cache.enabled:
            return False
        size = self._layout.page_size
        first, limit = sequence.num_computed // size, (sequence.num_tokens - 1) // size
        found = self.cache.match(sequence.chain.digests[first:limit])
        last = first + len(found)
        self.cache.release(sequence.pages[first:last])
        sequence.pages[first:last] = found
        upto = min(limit, last + max(1, LOADED_BYTES // self._layout.page_bytes))
        num_loaded = self.cache.load(sequence.chain.digests[last:upto], sequence.pages[last:upto])
        if not found and not num_loaded:
            return False
        sequence.num_computed, sequence.num_remembered = (last + num_loaded) * size, last
        self.remember(sequence)
        if not sequence.outputs:
            sequence.active.num_cached_tokens += (len(found) + num_loaded) * size
        self.is_blocked = False
        return last + num_loaded == upto < limit


def _key(sequence: Sequence) -> tuple[int, int]:
    return sequence.key


def _missing(sequence: Sequence) -> int:
    """Tokens that are to be computed before the sequence decodes."""
    return sequence.num_tokens - sequence.num_computed


def _rows_wanted(sequence: Sequence) -> int:
    """Decode rows the sequence takes once its tokens are computed; elsewhere if it is exported."""
    if sequence.active.export is not None:
        return 0
    return 1 if sequence.active.is_forked else sequence.active.num_rows
