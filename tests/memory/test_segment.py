"""Shared-memory segments: they hold a pool, are removed whatever happens, and are refused when memory is short."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from memory import segment
from memory.layout import KVLayout
from memory.segment import SegmentPool, attach, sweep

LAYOUT = KVLayout(2, 2, 16, 16, "bfloat16", "nhd")
SHAPE = (2, 3, LAYOUT.block_bytes)
ROOT = Path(__file__).parents[2]
OWNER = """
import sys, time
from memory.layout import KVLayout
from memory.segment import SegmentPool
pool = SegmentPool(KVLayout(2, 2, 16, 16, "bfloat16", "nhd"), 3)
print(pool.segment_name, flush=True)
sys.stdin.readline()
"""


def own_segments() -> set[str]:
    return {path.name for path in segment.DIRECTORY.glob(f"longctx-{os.getpid()}-*")}


def start_owner() -> tuple[subprocess.Popen[str], str]:
    """A process with a segment, and the segment's name."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_attach_sees_what_the_pool_holds() -> None:
    pool = SegmentPool(LAYOUT, 3)
    pool.storage.random_(0, 256)
    other = attach(pool.segment_name, SHAPE)
    np.testing.assert_array_equal(other, pool.storage.numpy())
    pool.views(1)[0][2].fill_(1.5)
    np.testing.assert_array_equal(other, pool.storage.numpy())
    with pytest.raises(ValueError, match="read-only"):
        other[0, 0, 0] = 1
    pool.close()
    pool.close()
    assert own_segments() == set()
    np.testing.assert_array_equal(other, pool.storage.numpy())  # memory outlives the name
    with pytest.raises(FileNotFoundError):
        attach(pool.segment_name, SHAPE)


def test_garbage_removes_the_segment() -> None:
    pool = SegmentPool(LAYOUT, 3)
    assert own_segments() == {pool.segment_name}
    del pool
    assert own_segments() == set()


@pytest.mark.parametrize(
    "name", ["", "passwd", "../dev/null", "longctx-1-00", "longctx-1-0123456789abcdef/x", "longctx-1-0123456789ABCDEF"]
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a segment"):
        attach(name, SHAPE)


def test_attach_checks_size_and_kind() -> None:
    pool = SegmentPool(LAYOUT, 3)
    with pytest.raises(ValueError, match=f"has {pool.storage.numel()} bytes"):
        attach(pool.segment_name, (2, 4, LAYOUT.block_bytes))
    link = segment.DIRECTORY / "longctx-1-0123456789abcdef"
    link.symlink_to(segment.DIRECTORY / pool.segment_name)
    try:
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.ELOOP))):
            attach(link.name, SHAPE)
    finally:
        link.unlink()


def test_sweep_removes_what_a_killed_process_left() -> None:
    process, name = start_owner()
    assert name not in sweep()  # it lives
    assert (segment.DIRECTORY / name).exists()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    assert (segment.DIRECTORY / name).exists()
    pool = SegmentPool(LAYOUT, 3)  # sweeps
    assert not (segment.DIRECTORY / name).exists()
    assert (segment.DIRECTORY / pool.segment_name).exists()
    pool.close()


def test_ordinary_exit_removes_the_segment() -> None:
    process, name = start_owner()
    process.communicate("\n", timeout=10)
    assert process.returncode == 0
    assert not (segment.DIRECTORY / name).exists()


def test_sweep_spares_locked_and_foreign_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of another container looks dead here, but holds its lock."""
    pool = SegmentPool(LAYOUT, 3)
    foreign = segment.DIRECTORY / "longctx-notes"
    foreign.touch()
    try:
        monkeypatch.setattr(segment, "_is_alive", lambda pid: pid != os.getpid())
        assert pool.segment_name not in sweep()
        assert own_segments() == {pool.segment_name}
        assert foreign.exists()
    finally:
        foreign.unlink()
        pool.close()


def test_pool_larger_than_shared_memory() -> None:
    status = os.statvfs(segment.DIRECTORY)
    num_pages = status.f_blocks * status.f_frsize // LAYOUT.page_bytes + 1
    with pytest.raises(OSError, match=r"bytes free, the KV pool needs \d+; make engine.kv_bytes smaller") as caught:
        SegmentPool(LAYOUT, num_pages)
    assert caught.value.errno == errno.ENOSPC
    assert "transport.name=tcp" in str(caught.value)
    assert own_segments() == set()


def test_nearly_full_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Space runs out although the segment would fit an empty /dev/shm."""

    def fail(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    monkeypatch.setattr(segment, "_free_bytes", lambda: 4096)
    needed = 3 * LAYOUT.page_bytes
    with pytest.raises(OSError, match=f"has 4096 bytes free, the KV pool needs {needed}"):
        SegmentPool(LAYOUT, 3)
    assert own_segments() == set()


def test_no_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(segment, "DIRECTORY", tmp_path / "missing")
    with pytest.raises(OSError, match=r"cannot hold KV pages .*transport\.name=tcp"):
        SegmentPool(LAYOUT, 3)


def test_memory_is_reserved() -> None:
    """Nothing is left to be found missing at the first write."""
    pool = SegmentPool(LAYOUT, 64)
    status = os.stat(segment.DIRECTORY / pool.segment_name)
    assert status.st_blocks * 512 >= pool.storage.numel()
    assert torch.equal(pool.storage, torch.zeros_like(pool.storage))
    pool.close()
