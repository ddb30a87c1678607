"""What became of pages between two steps, for ranks that hold the same pages: one allocates, the others do as it did.

Pages are numbered as their allocators number them, those below a pool behind the pool's own (``lower_pages.py``).
"""

from collections.abc import Iterable


class PageMoves:
    """Of one rank's pages, since they were last taken.

    A page that another worker sent is known here alone, and so is a copy of it: these the other ranks get as they are
    when the moves are taken, after they have made all copies.
    """

    def __init__(self) -> None:
        self._copies: list[tuple[int, int]] = []
        self._arrived: set[int] = set()

    def copy(self, source: int, target: int) -> None:
        """A page was copied."""
        self._copies.append((source, target))
        if source in self._arrived:
            self._arrived.add(target)

    def arrive(self, pages: Iterable[int]) -> None:
        """Pages hold what another worker sent."""
        self._arrived.update(pages)

    def forget(self, pages: Iterable[int]) -> None:
        """Nobody holds these any more. What was copied out of them before still counts."""
        self._arrived.difference_update(pages)

    def take(self) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
        """Copies in the order in which they were made, and pages whose bytes the other ranks need."""
        copies, arrived = tuple(self._copies), tuple(sorted(self._arrived))
        self._copies.clear()
        self._arrived.clear()
        return copies, arrived
