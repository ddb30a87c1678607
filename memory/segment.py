"""POSIX shared-memory segments that hold a pool's pages, and their removal whatever happens to the process.

A segment is a file ``longctx-<pid>-<random>`` in /dev/shm. Its creator keeps it locked (``flock``), which the kernel
undoes when the process dies, however it dies; ``sweep`` removes what dead processes left. Its memory is reserved when
it is created: without that, a full /dev/shm kills the process with SIGBUS at some later write. Python's own
``multiprocessing.shared_memory`` is not used because its resource tracker removes segments that other processes use.
"""

import errno
import fcntl
import logging
import math
import mmap
import os
import re
import secrets
import stat
import weakref
from pathlib import Path

import numpy as np
import torch

from memory.layout import KVLayout
from memory.pages import PagePool

logger = logging.getLogger(__name__)

DIRECTORY = Path("/dev/shm")
_NAME = re.compile(r"longctx-(\d+)-[0-9a-f]{16}")


class SegmentPool(PagePool):
    """A page pool in a shared-memory segment called ``segment_name``.

    The segment's name is removed by ``close``, when the pool is garbage, and when the interpreter exits; the memory
    stays usable for whoever has it mapped.

    Raises ``OSError`` if /dev/shm is missing or too small.
    """

    def __init__(self, layout: KVLayout, num_pages: int) -> None:
        sweep()
        shape = (layout.num_layers, num_pages, layout.block_bytes)
        self.segment_name, fd = _create(math.prod(shape))
        self._finalizer = weakref.finalize(self, _remove, self.segment_name, fd, os.getpid())
        memory = mmap.mmap(fd, math.prod(shape))
        storage = torch.from_numpy(np.frombuffer(memory, dtype=np.uint8)).view(shape)
        super().__init__(layout, num_pages, storage=storage)

    def close(self) -> None:
        """Remove the segment's name. Idempotent."""
        self._finalizer()


def attach(name: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Another process's segment, read-only: uint8 ``[num_layers, num_pages, block_bytes]``.

    Raises ``ValueError`` if ``name`` is no segment of this user with room for ``shape``, ``OSError`` if it is gone.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a segment")
    fd = os.open(DIRECTORY / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
            raise ValueError(f"segment {name} does not belong to this user")
        if status.st_size != math.prod(shape):
            raise ValueError(f"segment {name} has {status.st_size} bytes, not the {math.prod(shape)} of pages {shape}")
        memory = mmap.mmap(fd, status.st_size, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    return np.frombuffer(memory, dtype=np.uint8).reshape(shape)


def sweep() -> list[str]:
    """Remove this user's segments whose process is dead; returns their names."""
    removed = []
    for path in DIRECTORY.glob("longctx-*"):
        match = _NAME.fullmatch(path.name)
        if match and not _is_alive(int(match[1])) and _remove_if_unlocked(path):
            logger.warning("removed the shared-memory segment %s that a dead process left", path.name)
            removed.append(path.name)
    return removed


def _create(num_bytes: int) -> tuple[str, int]:
    """A new locked segment with all its memory reserved: its name and file descriptor."""
    name = f"longctx-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        fd = os.open(DIRECTORY / name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        text = f"{DIRECTORY} cannot hold KV pages ({error.strerror}); use transport.name=tcp"
        raise OSError(error.errno, text) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        _remove(name, fd, os.getpid())
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        raise OSError(
            error.errno,
            f"{DIRECTORY} has {_free_bytes()} bytes free, the KV pool needs {num_bytes}; "
            "make engine.kv_bytes smaller (attention.blocks_bytes, where blocks lie below), enlarge /dev/shm, or use "
            "transport.name=tcp",
        ) from error
    return name, fd


def _free_bytes() -> int:
    status = os.statvfs(DIRECTORY)
    return status.f_bavail * status.f_frsize


def _remove(name: str, fd: int, pid: int) -> None:
    if os.getpid() != pid:
        return  # a fork inherits the finalizer, not the segment
    (DIRECTORY / name).unlink(missing_ok=True)
    os.close(fd)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove_if_unlocked(path: Path) -> bool:
    """Remove the file unless it is another user's, or locked: by a process of another container, where pids differ."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False  # removed meanwhile, or not ours to read
    try:
        if os.fstat(fd).st_uid != os.getuid():
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
