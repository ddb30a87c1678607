"""Pages that ranks hold alike, near and below: what is repeated and handed over so that they stay alike.

``page_moves.py`` notes it on the rank that allocates. Pages below are numbered behind those near.
"""

from collections.abc import Sequence
from itertools import groupby

import torch

from memory.block_store import put_blocks
from memory.lower_pages import LowerPages
from memory.pages import PagePool


class SamePages:
    """One rank's.

    Args:
        near: its pool.
        below: what lies below; None: nothing.
    """

    def __init__(self, near: PagePool, below: LowerPages | None) -> None:
        self._near, self._below = near, below

    def repeat(self, copies: Sequence[tuple[int, int]]) -> None:
        """Make copies, (source, target) each, that were made elsewhere, in their order."""
        for goes_down, run in groupby(copies, lambda copy: copy[1] >= self._near.num_pages):
            sources, targets = zip(*run, strict=True)
            if goes_down:
                assert self._below is not None
                self._below.keep(sources, targets)
                continue
            for source, target in zip(sources, targets, strict=True):
                self._near.copy_page(source, target)

    def read(self, layer_idx: int, pages: Sequence[int]) -> torch.Tensor:
        """One layer of ascending ``pages``, uint8 ``[P, block_bytes]`` on the CPU."""
        near, lower = self._split(pages)
        storage = self._near.storage[layer_idx]
        parts = [storage.index_select(0, near.to(storage.device)).cpu()]
        if self._below is not None:
            parts.append(self._below.read_blocks(layer_idx, lower))
        return torch.cat(parts)

    def write(self, layer_idx: int, pages: Sequence[int], blocks_PX: torch.Tensor) -> None:
        """What ``read`` gave on another rank."""
        near, lower = self._split(pages)
        put_blocks(self._near.storage[layer_idx], near, blocks_PX[: len(near)])
        if self._below is not None:
            self._below.write_blocks(layer_idx, lower, blocks_PX[len(near) :])

    def _split(self, pages: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Those near and those below."""
        num_near = self._near.num_pages
        near = [page for page in pages if page < num_near]
        return torch.tensor(near, dtype=torch.int64), list(pages[len(near) :])
