"""KV pages of prompt prefixes in a folder: found again after a restart, and by every worker that sees the folder.

A page is one file (``page_files.py``), named by the digest of its tokens and all before them (``prefix_cache.py``), so
workers share a folder without talking: on one machine, over a network file system, or in ``/dev/shm`` as a tier in host
memory. A page is whole, all layers and heads, whichever rank computed it: workers of any number of ranks find it.

Pages are written on a thread of the store's own, and left out when it does not keep up. The same thread notes in the
files, every few seconds, which prefixes were used, from a prefix's end to its start: so it loses its tail before its
head, as in the pool. Left out: compression.
"""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import Protocol

import torch

from memory.layout import KVLayout
from memory.page_files import HEADER_BYTES, PageFiles

logger = logging.getLogger(__name__)

_WAITING_BYTES = 256 << 20  # of pages that are to be written; more are left out
_NOTE_S = 2.0  # between two times that uses are noted in the files
_AGAIN_S = 60.0  # after which it is tried again whether loading is faster by now
_SMOOTHING = 0.2  # of a new measurement in a rate
_CLOSE_S = 5.0

_NOTHING = torch.empty(0, dtype=torch.uint8)

Parts = tuple[torch.Tensor, ...]  # of a page, uint8 and contiguous, on the CPU


class Pages(Protocol):
    """Where pages come from and go to: ``PagePool``, or ``TieredPages``."""

    layout: KVLayout

    def read_page(self, page: int) -> torch.Tensor:
        """A copy of a full page, uint8 ``[num_layers, block_bytes]`` on the CPU."""
        ...

    def write_page(self, page: int, content_LX: torch.Tensor) -> None:
        """The inverse of ``read_page``, for a page that is held and that nothing was computed in."""
        ...


class PrefixStore:
    """Pages of one model in one layout.

    Args:
        files: the folder.
        pages: those that are saved and filled. Their engine's thread alone calls, but for ``close``.
    """

    def __init__(self, files: PageFiles, pages: Pages) -> None:
        self.layout = pages.layout
        self._files, self._pages = files, pages
        self.num_loaded = self.num_saved = self.num_dropped = 0
        self._load_s = self._compute_s = 0.0  # of a page, smoothed; 0: not known
        self._loaded_at = 0.0  # when the first was measured last
        self._known: set[bytes] = set()  # in the folder when last looked, or on the way there
        self._queue: queue.Queue[tuple[bytes, Parts] | None] = queue.Queue()
        self._waiting_bytes = 0
        self._uses: dict[bytes, int] = {}  # that the files do not tell of yet; used last is last
        self._lock = threading.Lock()  # of these
        self._is_closing = False
        self._thread = threading.Thread(target=self._write_all, name="prefix-store", daemon=True)
        self._thread.start()

    def count_pages(self) -> dict[str, int]:
        """Of pages since the start: found here, written here, left out, and files that were not as written."""
        return {
            "loaded": self.num_loaded,
            "saved": self.num_saved,
            "dropped": self.num_dropped,
            "damaged": self._files.num_damaged,
        }

    @property
    def is_worthwhile(self) -> bool:
        """Whether loading a page is faster than computing it, as far as is known."""
        if not self._load_s or not self._compute_s or self._load_s < self._compute_s:
            return True
        return time.monotonic() - self._loaded_at > _AGAIN_S

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """A step computed so many tokens of prompts."""
        self._compute_s = _smooth(self._compute_s, seconds * self.layout.page_size / num_tokens)

    def note_loaded(self, num_pages: int, seconds: float) -> None:
        """So many pages were loaded."""
        if num_pages:
            self._load_s = _smooth(self._load_s, seconds / num_pages)
            self._loaded_at = time.monotonic()
            self.num_loaded += num_pages

    def note_used(self, digests: Sequence[bytes]) -> None:
        """A sequence with these pages, in its order, has ended, or gave them up."""
        with self._lock:
            is_first = not self._uses
            for digest in reversed(digests):
                self._uses[digest] = self._uses.pop(digest, 0) + 1
        if is_first and digests:
            self._queue.put(None)

    def knows(self, digest: bytes) -> bool:
        """Whether the page need not be saved, as far as is known."""
        return digest in self._known

    def note_known(self, digest: bytes) -> None:
        """Another rank has the page, and saves it if need be."""
        self._known.add(digest)

    def count(self, digests: Sequence[bytes]) -> int:
        """How many of the first ones have files."""
        return next((idx for idx, digest in enumerate(digests) if not self._files.has(digest)), len(digests))

    def save(self, digests: Sequence[bytes], pages: Sequence[int]) -> None:
        """Pages are complete and held; what they hold now will be written, unless it is there already."""
        for digest, page in zip(digests, pages, strict=True):
            if not self.knows(digest):
                self._known.add(digest)
                if self.has_room(self.layout.page_bytes, digest):
                    self.put(digest, (self._pages.read_page(page),))

    def load(self, digests: Sequence[bytes], pages: Sequence[int]) -> int:
        """As ``fill``, and notes how long it took."""
        begun = time.perf_counter()
        count = self.fill(digests, pages)
        self.note_loaded(count, time.perf_counter() - begun)
        return count

    def fill(self, digests: Sequence[bytes], pages: Sequence[int]) -> int:
        """Fill ``pages`` with what was saved under ``digests``; returns how many of the first ones were there."""
        count = 0
        for digest, page in zip(digests, pages, strict=True):
            parts = self.get(digest, (self.layout.page_bytes,), (0,))
            if parts is None:
                break
            self._pages.write_page(page, parts[0].view(self.layout.num_layers, self.layout.block_bytes))
            count += 1
        return count

    def has_room(self, num_bytes: int, digest: bytes) -> bool:
        """Whether so much more may wait to be written; else ``digest`` is left out, and counted."""
        if self._waiting_bytes + num_bytes + HEADER_BYTES <= _WAITING_BYTES:
            return True
        self.num_dropped += 1
        self._known.discard(digest)
        return False

    def put(self, digest: bytes, parts: Parts) -> None:
        """Have a page written, for which there is room; nobody changes ``parts`` any more."""
        self._known.add(digest)
        self._waiting_bytes += _count_bytes(parts)
        self._queue.put((digest, parts))

    def get(self, digest: bytes, sizes: Sequence[int], wanted: Sequence[int]) -> list[torch.Tensor] | None:
        """Parts of a page, uint8; see ``PageFiles.read``."""
        parts = self._files.read(digest, sizes, wanted)
        if parts is None:
            self._known.discard(digest)
            return None
        self._known.add(digest)
        return [torch.frombuffer(part, dtype=torch.uint8) if part else _NOTHING for part in parts]

    def close(self) -> None:
        """Write what waits, for a few seconds at most. Idempotent."""
        self._is_closing = True
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    # The writer's thread

    def _write_all(self) -> None:
        noted_at = time.monotonic()
        while True:
            try:
                item = self._queue.get(timeout=_NOTE_S if self._uses else None)
            except queue.Empty:
                item = None
            if item is not None:
                self._write(*item)
            is_over = self._is_closing and self._queue.empty()
            if is_over or time.monotonic() - noted_at > _NOTE_S:
                self._note_uses()
                noted_at = time.monotonic()
            if is_over:
                return

    def _write(self, digest: bytes, parts: Parts) -> None:
        try:
            if not self._files.has(digest):
                if self._files.write(digest, [part.flatten().numpy().data for part in parts]):
                    self._known = set()  # what is known may be gone; it is looked up again
                self.num_saved += 1
        except OSError as error:
            self.num_dropped += 1
            self._known.discard(digest)
            logger.error("a prefix page cannot be written: %s", error)
        self._waiting_bytes -= _count_bytes(parts)  # two threads count; an error of a page or two does not matter

    def _note_uses(self) -> None:
        with self._lock:
            uses, self._uses = self._uses, {}
        age = self._files.age() if uses else 0
        for digest, num_uses in uses.items():
            if not self._files.touch(digest, num_uses, age):
                self._known.discard(digest)


def _count_bytes(parts: Parts) -> int:
    return HEADER_BYTES + sum(part.numel() for part in parts)


def _smooth(mean: float, value: float) -> float:
    return value if not mean else mean + _SMOOTHING * (value - mean)
