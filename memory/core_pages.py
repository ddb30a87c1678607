"""Pages of a sequence under CCA attention: cores of all that was, and only the nearest tokens as they are.

Of a sequence of L tokens in groups of g with a window of s, L // g cores stay and s to s + g - 1 tokens; pages that lie
wholly before those are free for others (Chen et al., 2024, arXiv 2412.12465). A core is stored like a token's key and
value. Pages are counted here; who takes and frees them is ``longctx/engine/core_scheduler.py``.
"""

from bisect import bisect_right
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CoreSizes:
    """Tokens of a group and of the window, as in ``longctx.cca_attention``."""

    group_size: int
    window: int

    def num_cores(self, num_tokens: int) -> int:
        """Cores that ``num_tokens`` tokens have: one for each whole group."""
        return num_tokens // self.group_size

    def first_token(self, position: int) -> int:
        """The first token that the one at ``position`` sees as it is; later ones see none before it."""
        return max(0, (position + 1 - self.window) // self.group_size) * self.group_size


@dataclass(slots=True)
class CorePages:
    """What one sequence holds besides the pages of its nearest tokens (``Sequence.pages``)."""

    sizes: CoreSizes
    cores: list[int] = field(default_factory=list)  # their pages in order, bounds behind each if groups are fetched
    spare: list[int] = field(default_factory=list)  # empty ones, for the tokens of the next chunk
    num_passed: int = 0  # pages of tokens before the first that is held: they are free again
    kept: list[int] = field(default_factory=list)  # their copies below, in order, and places of coming ones

    def lasting(self, pages: list[int], num_tokens: int, page_size: int) -> list[int]:
        """All that the sequence is once ``num_tokens`` are computed, whose pages are ``pages``: what travels.

        Pages of cores, then those of the tokens that the coming one sees, and of as many before as are in their first;
        where groups are fetched, those of all tokens, wherever they are.
        """
        if self.kept:
            return self.cores + self.kept[: self.num_passed] + pages
        return self.cores + pages[self.sizes.first_token(num_tokens) // page_size - self.num_passed :]


@dataclass(frozen=True, slots=True)
class CoreCapacity:
    """How many pages a sequence needs, and how many tokens some pages take.

    Args:
        page_size: entries of a page: tokens or cores.
        chunk_size: tokens that one step computes at most, a multiple of ``page_size``; chunks begin where pages do.
        core_stride: pages that so many cores take: 2 if a page of cores is followed by one of their groups' bounds.
    """

    page_size: int
    chunk_size: int
    core_stride: int = 1

    def count_core_pages(self, sizes: CoreSizes, num_tokens: int) -> int:
        """Pages of all cores of ``num_tokens`` tokens, and of their groups' bounds where there are any."""
        return self.core_stride * -(-sizes.num_cores(num_tokens) // self.page_size)

    def count_token_pages(self, sizes: CoreSizes, num_tokens: int) -> int:
        """Pages of tokens at most at one time, while ``num_tokens`` are computed in chunks or one by one."""
        behind = sizes.window + sizes.group_size - 2  # tokens before a chunk that its first one sees
        most = -(-behind // self.page_size) + self.chunk_size // self.page_size
        return min(most, -(-num_tokens // self.page_size))

    def count_pages(self, sizes: CoreSizes, num_tokens: int) -> int:
        """Pages that a sequence of ``num_tokens`` never needs more of."""
        return self.count_core_pages(sizes, num_tokens) + self.count_token_pages(sizes, num_tokens)

    def count_tokens(self, sizes: CoreSizes, num_pages: int, *, at_most: int) -> int:
        """Tokens of the longest sequence that ``num_pages`` suffice for, up to ``at_most``."""
        return bisect_right(range(at_most + 1), num_pages, key=lambda length: self.count_pages(sizes, length)) - 1
