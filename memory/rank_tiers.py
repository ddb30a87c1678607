"""Tiers of one rank among several: rank 0 allocates (``sharded_pages.py``), and steps say what becomes of a page.

A page that is not full is written to in every step until it is, or nobody holds it any more: what a step leaves out
gives its frame up, and nobody has to be told that a page is free. Full pages go down as soon as the step is over: what
comes to lie below under their numbers afterwards is not overwritten.
"""

from collections.abc import Sequence

from memory.tiered_pages import TieredPages


class RankTiers(TieredPages):
    """``TieredPages`` that are numbered as this rank's ``ShardedPages`` are, and allocated there."""

    def begin_step(self, pages: Sequence[int], *, begun: Sequence[int], filled: Sequence[int]) -> None:
        """See the base class; what this rank does not write to gives its frame up."""
        self._wait()
        self._unstage(sorted(set((self._staged_P >= 0).nonzero()[:, 0].tolist()).difference(pages)))
        super().begin_step(pages, begun=begun, filled=filled)

    def note_arrived(self, pages: Sequence[int], num_full: int) -> None:
        """See the base class; what was here under these numbers is nobody's any more."""
        self._wait()
        self._unstage([page for page in pages if self._staged_P[page] >= 0])
        super().note_arrived(pages, num_full)

    def end_step(self) -> None:
        """The step is computed: what it filled goes down."""
        self._wait()
        self._send_down()
