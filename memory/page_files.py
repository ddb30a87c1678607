"""Pages as files of one folder that many processes share: found by name, checked when read, bounded in bytes.

A file is written beside its place and renamed, and carries checksums: a crash leaves no half page, and what is not what
was written is deleted and is no page. Whoever writes looks now and then at what the folder holds, one process at a
time, and deletes what ``memory/eviction.py`` says goes first.

How a file was used is said by its own times, which are set by one call that nothing can tear: the access time is when
it was used last, the modification time, in seconds since 1970, how often. So processes with different policies share a
folder, and two that count at the same time lose a count at most. The least count in the folder, from which new files
begin (see ``Lfu``), is the modification time of the file that is locked meanwhile.
"""

import fcntl
import logging
import os
import stat
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import xxhash

from memory.eviction import EVICTIONS

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<8s16s16sQ16sQ")  # mark, digest; checksum and bytes of each part
_MARK = b"lctxkv02"
_NUM_PARTS = 2
_SWEEP_SHARE = 0.05  # of the budget that is written between two looks at what the folder holds
_KEPT_SHARE = 0.9  # of the budget that is left after one that deletes
_STALE_S = 600.0  # age of an unfinished file whose writer is gone
_MOST_USES = 1 << 30  # a modification time above is one that somebody else set
_SECOND = 10**9

HEADER_BYTES = _HEADER.size


class PageFiles:
    """The files of one model's pages.

    Args:
        folder: made if it is not there.
        max_bytes: that it may hold, all its users together.
        eviction: what is deleted first, a name of ``EVICTIONS``.

    Reading, and writing and touching, may be done by two threads. Raises ``OSError`` if the folder cannot be used.
    """

    def __init__(self, folder: Path, *, max_bytes: int, eviction: str = "lru") -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder, self._max_bytes = folder, max_bytes
        self._order = EVICTIONS.get(eviction).order
        self.num_damaged = 0
        self._unswept_bytes = max_bytes  # the first file that is written looks at what is there
        probe = folder / f"probe-{os.getpid()}-{threading.get_ident()}"
        probe.write_bytes(b"")
        probe.unlink()

    def path(self, digest: bytes) -> Path:
        """Where a page is, if it is there."""
        name = digest.hex()
        return self._folder / name[:2] / f"{name}.kv"

    def has(self, digest: bytes) -> bool:
        """Whether there is a file; what is in it, only ``read`` says."""
        return os.path.exists(self.path(digest))

    def read(self, digest: bytes, sizes: Sequence[int], wanted: Sequence[int]) -> list[bytearray] | None:
        """Parts of a page; None if there is none, or not as it was written, or not readable: these are counted.

        One that is not as it was written is deleted.

        Args:
            digest: its name.
            sizes: bytes of all of its parts.
            wanted: which parts.
        """
        path = self.path(digest)
        try:
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # whatever is there, nothing waits for it
        except FileNotFoundError:
            return None
        except OSError as error:
            return self._refuse(path, error)
        try:
            parts = _read_parts(file, digest, sizes, wanted)
        except OSError as error:
            return self._refuse(path, error)
        finally:
            os.close(file)
        if parts is None:
            logger.warning("%s is damaged; it is deleted, and the page is computed again", path)
            self.num_damaged += 1
            with suppress(OSError):
                path.unlink()
        return parts

    def _refuse(self, path: Path, error: OSError) -> None:
        self.num_damaged += 1
        logger.error("%s cannot be read: %s", path, error)

    def write(self, digest: bytes, parts: Sequence[memoryview]) -> bool:
        """Add a page, which another process may have done; returns whether the folder was looked through before.

        Raises ``OSError``.
        """
        path, size = self.path(digest), _HEADER.size + sum(map(len, parts))
        self._unswept_bytes += size
        is_swept = self._unswept_bytes >= _SWEEP_SHARE * self._max_bytes
        if is_swept:
            self._sweep()
            self._unswept_bytes = 0
        path.parent.mkdir(exist_ok=True, mode=0o700)
        unfinished = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with unfinished.open("wb") as file:
                file.write(_head(digest, parts))
                for part in parts:
                    file.write(part)
            unfinished.rename(path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()
            raise
        self.touch(digest, 1, self.age())
        return is_swept

    def age(self) -> int:
        """The least number of uses that a file counts."""
        try:
            return _uses(os.stat(self._folder / "lock").st_mtime_ns, 0)
        except OSError:
            return 0

    def touch(self, digest: bytes, num_uses: int, age: int) -> bool:
        """The page was used so often, the last time now, in a folder of that ``age``; False if there is none."""
        path = self.path(digest)
        try:
            count = max(_uses(os.stat(path).st_mtime_ns, age), age) + num_uses
            os.utime(path, ns=(time.time_ns(), count * _SECOND))
        except OSError:
            return False
        return True

    def _sweep(self) -> None:
        """Delete what goes first, if there is too much; nobody else does meanwhile."""
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            age = _uses(os.fstat(lock).st_mtime_ns, 0)
            files = sorted(self._list_files(age), key=lambda file: self._order(file[0], file[1]))
            total = sum(size for _, _, size, _ in files)
            if total + _SWEEP_SHARE * self._max_bytes <= self._max_bytes:
                return
            for index, (_, _, size, path) in enumerate(files):
                if total <= _KEPT_SHARE * self._max_bytes:
                    age = max(age, min(count for count, *_ in files[index:]))
                    break
                with suppress(OSError):
                    path.unlink()
                total -= size
            os.utime(lock, ns=(time.time_ns(), age * _SECOND))
        except BlockingIOError:
            return  # another one is at it
        finally:
            os.close(lock)

    def _list_files(self, age: int) -> Iterator[tuple[int, int, int, Path]]:
        """(Uses, when last, bytes, path) of every page; unfinished ones of processes that are gone are deleted."""
        for folder in os.scandir(self._folder):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder.path):
                with suppress(OSError):
                    found, path = entry.stat(follow_symlinks=False), Path(entry.path)
                    if path.suffix == ".kv":
                        yield _uses(found.st_mtime_ns, age), found.st_atime_ns, found.st_size, path
                    elif time.time() - found.st_mtime > _STALE_S:
                        path.unlink()


def _uses(modified_ns: int, age: int) -> int:
    """How often a file was used, as its modification time says; ``age`` if that is a time."""
    count = modified_ns // _SECOND
    return count if 0 <= count < _MOST_USES else age


def _head(digest: bytes, parts: Sequence[memoryview]) -> bytes:
    summed = [(xxhash.xxh3_128_digest(part), len(part)) for part in parts]
    summed += [(xxhash.xxh3_128_digest(b""), 0)] * (_NUM_PARTS - len(parts))
    return _HEADER.pack(_MARK, digest, *(field for each in summed for field in each))


def _read_parts(file: int, digest: bytes, sizes: Sequence[int], wanted: Sequence[int]) -> list[bytearray] | None:
    """Parts of an open file; None if it is not what ``PageFiles.write`` wrote under this name with these sizes."""
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_size != _HEADER.size + sum(sizes):
        return None
    head = os.pread(file, _HEADER.size, 0)
    if len(head) != _HEADER.size:
        return None
    mark, name, *summed = _HEADER.unpack(head)
    all_sizes = [*sizes, *[0] * (_NUM_PARTS - len(sizes))]
    if (mark, name, summed[1::2]) != (_MARK, digest, all_sizes):
        return None
    parts = []
    for index in wanted:
        part = bytearray(sizes[index])
        read = os.preadv(file, [part], _HEADER.size + sum(sizes[:index])) if part else 0
        if read != len(part) or xxhash.xxh3_128_digest(part) != summed[2 * index]:
            return None
        parts.append(part)
    return parts
