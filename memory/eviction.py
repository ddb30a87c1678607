"""Which of the pages that nobody holds is forgotten first, when the pool or a folder of them needs room.

Pages are given up from the end of their sequence to its start, and a page is used whenever one behind it is. So with
every policy here a prefix loses its tail before its head: what is left can still be found.
"""

import heapq
import itertools
from abc import ABC, abstractmethod
from collections import OrderedDict

from parallel.registry import Registry


class Eviction(ABC):
    """The idle pages of one pool, in the order in which they go."""

    @staticmethod
    @abstractmethod
    def order(num_uses: int, used_at: int) -> tuple[int, ...]:
        """What goes first where pages are not one process's to count (``memory/page_files.py``): the least.

        Args:
            num_uses: how often a page was used, as ``Lfu`` counts.
            used_at: when it was used last.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Idle pages."""

    def begin(self, page: int) -> None:  # noqa: B027 - nothing to do for most
        """The page, which somebody holds, has something new."""

    @abstractmethod
    def add(self, page: int) -> None:
        """Nobody holds the page any more."""

    @abstractmethod
    def take(self, page: int) -> None:
        """A sequence found the page; it may be held already."""

    @abstractmethod
    def pop(self) -> int:
        """The page that goes; there is one."""


class Lru(Eviction):
    """Least recently used first."""

    @staticmethod
    def order(num_uses: int, used_at: int) -> tuple[int, ...]:
        return (used_at,)

    def __init__(self) -> None:
        self._pages: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def add(self, page: int) -> None:
        self._pages[page] = None

    def take(self, page: int) -> None:
        self._pages.pop(page, None)

    def pop(self) -> int:
        return self._pages.popitem(last=False)[0]


class Lfu(Eviction):
    """Least frequently used first, with dynamic ageing (LFU-DA): a count begins at the count of what went last.

    A system prompt that every request begins with outlives a burst of long documents that come once. Without ageing,
    what was popular yesterday would stay for ever. Among equals the least recently used goes first.

    Source: M. Arlitt et al., "Evaluating content management techniques for Web proxy caches", 2000.
    """

    @staticmethod
    def order(num_uses: int, used_at: int) -> tuple[int, ...]:
        return (num_uses, used_at)

    def __init__(self) -> None:
        self._age = 0  # count of the page that went last
        self._counts: dict[int, int] = {}  # of idle and held pages
        self._numbers = itertools.count()
        self._heap: list[tuple[int, int, int]] = []  # count, number, page; some are out of date
        self._valid: dict[int, int] = {}  # number of each idle page's entry

    def __len__(self) -> int:
        return len(self._valid)

    def begin(self, page: int) -> None:
        self._counts[page] = self._age + 1

    def add(self, page: int) -> None:
        count = self._counts[page]
        number = self._valid[page] = next(self._numbers)
        heapq.heappush(self._heap, (count, number, page))
        if len(self._heap) > 2 * len(self._valid) + 64:
            self._heap = [entry for entry in self._heap if self._valid.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def take(self, page: int) -> None:
        self._valid.pop(page, None)
        self._counts[page] = max(self._counts[page], self._age) + 1

    def pop(self) -> int:
        while True:
            count, number, page = heapq.heappop(self._heap)
            if self._valid.get(page) == number:
                del self._valid[page], self._counts[page]
                self._age = count
                return page


EVICTIONS = Registry("eviction", {"lru": "memory.eviction:Lru", "lfu": "memory.eviction:Lfu"})
