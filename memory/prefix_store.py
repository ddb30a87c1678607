"""KV pages of prompt prefixes in a folder: found again after a restart, and by every worker that sees the folder.

A page is one file, named by the digest of its tokens and all before them (``memory/prefix_cache.py``), so workers share
a folder without talking: on one machine, over a network file system, or in ``/dev/shm`` as a tier in host memory. A
file is written beside its place and renamed, and carries a checksum: a crash leaves no half page, and a page that is
not what was written is deleted and computed again. The folder is bounded: whoever writes deletes what was used longest
ago, one process at a time.

Pages are written on a thread of the store's own, and left out when it does not keep up. Left out: compression.
"""

import fcntl
import logging
import os
import queue
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
import xxhash

from memory.pages import PagePool

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<8s16s16sQ")  # mark, digest, checksum of the page, its bytes
_MARK = b"lctxkv01"
_WAITING_BYTES = 256 << 20  # of pages that are to be written; more are left out
_SWEEP_SHARE = 0.05  # of the budget that is written between two looks at what the folder holds
_KEPT_SHARE = 0.9  # of the budget that is left after one that deletes
_STALE_S = 600.0  # age of an unfinished file whose writer is gone
_SMOOTHING = 0.2  # of a new measurement in a rate
_CLOSE_S = 5.0


class PrefixStore:
    """Pages of one model in one layout.

    Args:
        folder: of this model's pages; made if it is not there.
        pool: whose pages are saved and filled. Its engine's thread alone calls, but for ``close``.
        max_bytes: that the folder may hold, all its users together.

    Raises ``OSError`` if the folder cannot be used.
    """

    def __init__(self, folder: Path, pool: PagePool, *, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder, self._pool, self._max_bytes = folder, pool, max_bytes
        self._file_bytes = _HEADER.size + pool.layout.page_bytes
        self.num_loaded = self.num_saved = self.num_dropped = self.num_damaged = 0
        self._load_s = self._compute_s = 0.0  # of a page, smoothed; 0: not known
        self._known: set[bytes] = set()  # on disk when last looked, or on the way there
        self._queue: queue.Queue[tuple[bytes, torch.Tensor] | None] = queue.Queue()
        self._waiting_bytes = 0
        self._unswept_bytes = max_bytes  # the first page that is written looks at what is there
        self._probe()
        self._thread = threading.Thread(target=self._write_all, name="prefix-store", daemon=True)
        self._thread.start()

    @property
    def is_worthwhile(self) -> bool:
        """Whether loading a page is faster than computing it, as far as is known."""
        return not self._load_s or not self._compute_s or self._load_s < self._compute_s

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """A step computed so many tokens of prompts."""
        self._compute_s = _smooth(self._compute_s, seconds * self._pool.layout.page_size / num_tokens)

    def save(self, digests: Sequence[bytes], pages: Sequence[int]) -> None:
        """Pages are complete and held; what they hold now will be written, unless it is there already."""
        for digest, page in zip(digests, pages, strict=True):
            if digest in self._known:
                continue
            self._known.add(digest)
            if self._waiting_bytes + self._file_bytes > _WAITING_BYTES:
                self.num_dropped += 1
                self._known.discard(digest)
                continue
            self._waiting_bytes += self._file_bytes
            content = self._pool.storage[:, page].to("cpu", copy=True).contiguous()
            self._queue.put((digest, content))

    def load(self, digests: Sequence[bytes], pages: Sequence[int]) -> int:
        """Fill ``pages`` with what was saved under ``digests``; returns how many of the first ones were there."""
        for count, (digest, page) in enumerate(zip(digests, pages, strict=True)):
            begun = time.perf_counter()
            if not self._load(digest, page):
                return count
            self._load_s = _smooth(self._load_s, time.perf_counter() - begun)
            self.num_loaded += 1
        return len(digests)

    def close(self) -> None:
        """Write what waits, for a few seconds at most. Idempotent."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self._folder / name[:2] / f"{name}.kv"

    def _load(self, digest: bytes, page: int) -> bool:
        path = self._path(digest)
        try:
            data = path.read_bytes()
            os.utime(path)  # used now
        except OSError:
            self._known.discard(digest)
            return False
        body = memoryview(data)[_HEADER.size :]
        if len(data) != self._file_bytes or _HEADER.unpack_from(data) != (
            _MARK,
            digest,
            xxhash.xxh3_128_digest(body),
            len(body),
        ):
            logger.warning("%s is damaged; it is deleted, and the page is computed again", path)
            self.num_damaged += 1
            self._known.discard(digest)
            with suppress(OSError):
                path.unlink()
            return False
        layout = self._pool.layout
        content = torch.frombuffer(bytearray(body), dtype=torch.uint8).view(layout.num_layers, layout.block_bytes)
        self._pool.storage[:, page].copy_(content)
        self._known.add(digest)
        return True

    # The writer's thread

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            digest, content = item
            path = self._path(digest)
            try:
                if not path.exists():
                    self._write(path, digest, content)
                    self.num_saved += 1
            except OSError as error:
                self.num_dropped += 1
                self._known.discard(digest)
                logger.error("a prefix page cannot be written to %s: %s", self._folder, error)
            self._waiting_bytes -= self._file_bytes  # two threads count; an error of a page or two does not matter

    def _write(self, path: Path, digest: bytes, content: torch.Tensor) -> None:
        self._unswept_bytes += self._file_bytes
        if self._unswept_bytes >= _SWEEP_SHARE * self._max_bytes:
            self._sweep()
            self._unswept_bytes = 0
        body = content.numpy().data.cast("B")
        path.parent.mkdir(exist_ok=True, mode=0o700)
        unfinished = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with unfinished.open("wb") as file:
                file.write(_HEADER.pack(_MARK, digest, xxhash.xxh3_128_digest(body), len(body)))
                file.write(body)
            unfinished.rename(path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()
            raise

    def _sweep(self) -> None:
        """Delete what was used longest ago, if there is too much; nobody else does meanwhile."""
        with (self._folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return  # another one is at it
            files = list(self._list_files())
            total = sum(size for _, size, _ in files)
            if total + _SWEEP_SHARE * self._max_bytes <= self._max_bytes:
                return
            for _, size, path in sorted(files):
                if total <= _KEPT_SHARE * self._max_bytes:
                    break
                with suppress(OSError):
                    path.unlink()
                total -= size
        self._known = set()  # what is known may be gone; it is looked up again

    def _list_files(self):
        """(When used last, bytes, path) of every page; unfinished ones of processes that are gone are deleted."""
        for folder in os.scandir(self._folder):
            if not folder.is_dir():
                continue
            for entry in os.scandir(folder.path):
                with suppress(OSError):
                    stat, path = entry.stat(), Path(entry.path)
                    if path.suffix == ".kv":
                        yield stat.st_mtime, stat.st_size, path
                    elif time.time() - stat.st_mtime > _STALE_S:
                        path.unlink()

    def _probe(self) -> None:
        """Raise ``OSError`` now if nothing can be written there."""
        probe = self._folder / f"probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()


def _smooth(mean: float, value: float) -> float:
    return value if not mean else mean + _SMOOTHING * (value - mean)
