"""Pages that lie on several ranks, as the rank that schedules sees them: ids, reference counts and where to put what.

Page ``p`` is page ``p % pages_per_rank`` of the pool of rank ``p // pages_per_rank``. The pages of a prompt are dealt
out as in the zigzag layout of sequence parallelism (``parallel/layout.py``), a stretch of what one step computes at a
time, so that every rank has an equal share of each step's causal area. The bytes are elsewhere: each rank has a
``PagePool`` of its own, and what is to be done with pages before the next step is collected here: copies, landmarks
that other ranks are to be told, and pages that their ranks are to save (``longctx/shards/prefixes.py``).
"""

from collections.abc import Sequence

from memory.layout import KVLayout
from memory.pages import PageAllocator


class ShardedPages(PageAllocator):
    """The pages of ``world_size`` pools of ``pages_per_rank`` pages each.

    Args:
        layout: of every pool.
        pages_per_rank: pages of each.
        world_size: pools.
        stretch_pages: pages of a prompt that one step computes, over all ranks.
        own: this rank's, told of what is final; None: nothing has to be.
    """

    def __init__(
        self,
        layout: KVLayout,
        pages_per_rank: int,
        *,
        world_size: int,
        stretch_pages: int,
        own: PageAllocator | None = None,
    ) -> None:
        super().__init__(layout, pages_per_rank * world_size)
        self._own = own
        self.pages_per_rank, self.world_size = pages_per_rank, world_size
        self._stretch_pages = stretch_pages
        self._free = [
            list(range((rank + 1) * pages_per_rank - 1, rank * pages_per_rank - 1, -1)) for rank in range(world_size)
        ]
        self._copies: list[tuple[int, int]] = []
        self._arrived: list[int] = []
        self._saves: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return sum(map(len, self._free))

    def rank_of(self, page: int) -> int:
        """Who holds a page."""
        return page // self.pages_per_rank

    def copy_page(self, source: int, target: int) -> None:
        if self.rank_of(source) != self.rank_of(target):
            raise AssertionError(f"pages {source} and {target} lie on two ranks")
        self._copies.append((source, target))

    def take_copies(self) -> list[tuple[int, int]]:
        """Copies to make before the next step computes, in their order; they are forgotten here."""
        copies, self._copies = self._copies, []
        return copies

    def note_final(self, layer_idx: int, pages: Sequence[int]) -> None:
        own = [page for page in pages if self.rank_of(page) == 0]
        if self._own is not None and own:
            self._own.note_final(layer_idx, own)

    def note_arrived(self, pages: Sequence[int], num_full: int) -> None:
        if self.layout.has_landmark:
            self._arrived += pages  # also one that is not full, whose landmark nobody reads: its rank is to know

    def take_arrived(self) -> list[int]:
        """Pages that arrived, and whose landmarks one rank alone knows; they are forgotten here."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def save(self, page: int, digest: bytes) -> None:
        """A page of another rank is complete, and is to be saved there under its digest."""
        self._saves[page] = digest

    @property
    def has_saves(self) -> bool:
        """Whether there are such pages."""
        return bool(self._saves)

    def take_saves(self) -> list[tuple[int, bytes]]:
        """Pages to save before anything else is done with them; they are forgotten here, or once they are free."""
        saves, self._saves = list(self._saves.items()), {}
        return saves

    def allocate(self, num_pages: int, *, beside: Sequence[int] = ()) -> list[int] | None:
        """See ``PageAllocator``; also None if a rank has no room for a copy beside its original."""
        for rank in {self.rank_of(page) for page in beside}:
            missing = sum(self.rank_of(page) == rank for page in beside) - len(self._free[rank])
            while missing > 0 and self.evict is not None and self.evict(1):
                missing = sum(self.rank_of(page) == rank for page in beside) - len(self._free[rank])
            if missing > 0:
                return None
        return super().allocate(num_pages, beside=beside)

    def _take(self, num_pages: int, beside: Sequence[int]) -> list[int]:
        if beside:
            return [self._free[self.rank_of(page)].pop() for page in beside]
        return [self._take_one(rank) for rank in self._deal(num_pages)]

    def _deal(self, num_pages: int) -> list[int]:
        """The rank of each page of a run; -1: any. A single page, which a growing sequence asks for, goes anywhere."""
        if num_pages == 1:
            return [-1]
        num_stretches = -(-num_pages // self._stretch_pages)
        ranks: list[int] = []
        for index in range(num_stretches):
            start, stop = num_pages * index // num_stretches, num_pages * (index + 1) // num_stretches
            ranks += [self._zigzag(page, stop - start) for page in range(stop - start)]
        return ranks

    def _zigzag(self, page: int, num_pages: int) -> int:
        num_chunks = 2 * self.world_size
        chunk = (
            (page + 1) * num_chunks - 1
        ) // num_pages  # chunk c is [c * num_pages // 2W, (c + 1) * num_pages // 2W)
        return min(chunk, num_chunks - 1 - chunk)

    def _take_one(self, rank: int) -> int:
        """A page of ``rank``; of the one with most free pages if that has none, or for -1."""
        if rank < 0 or not self._free[rank]:
            rank = max(range(self.world_size), key=lambda each: len(self._free[each]))
        return self._free[rank].pop()

    def _give_back(self, pages: list[int]) -> None:
        self._copies = [(source, target) for source, target in self._copies if target not in pages]
        for page in pages:
            self._saves.pop(page, None)  # something else may come into it at any time
            self._free[self.rank_of(page)].append(page)
