"""Pages of prefixes in a folder: what was saved is found, by others too; what is damaged is not; and it stays small."""

import os
import time

import pytest
import torch

from memory.layout import KVLayout
from memory.page_files import HEADER_BYTES, PageFiles
from memory.pages import PagePool
from memory.prefix_store import PrefixStore

LAYOUT = KVLayout(3, 2, 4, 8, "float32", "hnd")
FILE_BYTES = LAYOUT.page_bytes + HEADER_BYTES


def make_pool(seed=0, num_pages=8):
    pool = PagePool(LAYOUT, num_pages)
    pool.storage.copy_(torch.randint(0, 256, pool.storage.shape, generator=torch.Generator().manual_seed(seed)))
    return pool


def digest(number):
    return number.to_bytes(16, "big")


def open_store(folder, pool, max_bytes=1 << 30, eviction="lru"):
    return PrefixStore(PageFiles(folder, max_bytes=max_bytes, eviction=eviction), pool)


def path_of(store, number):
    return store._files.path(digest(number))


def wait_written(store):
    while store._waiting_bytes:
        time.sleep(0.001)


def settle(store):
    """Until everything is written; the store is over."""
    store.close()
    assert not store._thread.is_alive()


def test_what_was_saved_is_found_by_another_one(tmp_path):
    pool, other = make_pool(1), make_pool(2)
    store = open_store(tmp_path, pool)
    store.save([digest(1), digest(2), digest(3)], [5, 0, 7])
    pool.storage[:, 5] = 0  # what a page held when it was saved counts
    settle(store)
    expected = make_pool(1).storage
    found = open_store(tmp_path, other)
    assert found.load([digest(1), digest(2), digest(9), digest(3)], [0, 1, 2, 3]) == 2
    assert torch.equal(other.storage[:, :2], expected[:, [5, 0]])
    assert torch.equal(other.storage[:, 2:], make_pool(2).storage[:, 2:])
    assert (found.num_loaded, store.num_saved) == (2, 3)
    settle(found)


def test_a_page_is_written_once(tmp_path):
    store = open_store(tmp_path, make_pool())
    store.save([digest(1)], [0])
    store.save([digest(1)], [1])
    settle(store)
    again = open_store(tmp_path, make_pool())
    again.save([digest(1)], [2])
    settle(again)
    assert (store.num_saved, again.num_saved) == (1, 0)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another's", "longer", "pipe", "folder", "loop"])
def test_damaged_pages_are_deleted_and_not_used(tmp_path, damage):
    store = open_store(tmp_path, make_pool(1))
    store.save([digest(1), digest(2)], [0, 1])
    settle(store)
    path = path_of(store, 1)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-1]
    elif damage == "flipped":
        data[100] ^= 1
    elif damage == "empty":
        data = bytearray()
    elif damage == "another's":
        data = bytearray(path_of(store, 2).read_bytes())
    else:
        data += b"0"
    if damage in ("pipe", "folder", "loop"):
        path.unlink()
        {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda path: path.symlink_to(path)}[damage](path)
    else:
        path.write_bytes(data)
    pool = make_pool(2)
    other = open_store(tmp_path, pool)
    assert other.load([digest(1), digest(2)], [0, 1]) == 0
    assert torch.equal(pool.storage, make_pool(2).storage)
    assert path.exists() == (damage == "folder") and other.count_pages()["damaged"] == 1
    other.save([digest(1)], [3])
    settle(other)
    assert path.exists()


@pytest.mark.parametrize("eviction", ["lru", "lfu"])
def test_the_folder_stays_within_its_bounds_and_keeps_what_is_used(tmp_path, eviction):
    most = 10 * FILE_BYTES
    store = open_store(tmp_path, make_pool(), most, eviction)
    for number in range(40):
        store.save([digest(number)], [0])
        store.note_used([digest(0)])  # again and again
        wait_written(store)
        store._note_uses()
        assert sum(each.stat().st_size for each in tmp_path.rglob("*.kv")) <= most
    settle(store)
    kept = sorted(int(each.stem, 16) for each in tmp_path.rglob("*.kv"))
    assert kept[0] == 0 and kept[1:] == list(range(41 - len(kept), 40))
    assert len(kept) >= 8


@pytest.mark.parametrize("eviction", ["lru", "lfu"])
def test_what_goes_first_is_the_policys_to_say(tmp_path, eviction):
    """Ten uses long ago against two just now; the count is another process's."""
    most = 10 * FILE_BYTES
    first, second = (open_store(tmp_path, make_pool(), most, eviction) for _ in range(2))
    for number in range(9):
        first.save([digest(number)], [0])
    wait_written(first)
    for _ in range(10):
        first.note_used([digest(0)])
        first._note_uses()
    for number in range(1, 9):
        second.note_used([digest(number)])
        second._note_uses()
    second.save([digest(100), digest(101)], [0, 0])
    settle(first)
    settle(second)
    assert path_of(first, 0).exists() == (eviction == "lfu")
    assert path_of(first, 8).exists()


def test_counts_age_so_that_nothing_stays_for_ever(tmp_path):
    store = open_store(tmp_path, make_pool(), 10 * FILE_BYTES, "lfu")
    store.save([digest(0)], [0])
    for number in range(1, 200):
        store.note_used([digest(0)] * 3 if number < 10 else [digest(number - 1)])
        store.save([digest(number)], [0])
        wait_written(store)
        store._note_uses()
        if number == 30:
            assert path_of(store, 0).exists()
    settle(store)
    assert not path_of(store, 0).exists()


def test_a_prefix_loses_its_tail_before_its_head(tmp_path):
    store = open_store(tmp_path, make_pool(), 20 * FILE_BYTES)
    digests = [digest(number) for number in range(19)]
    store.save(digests, [0] * 19)
    wait_written(store)
    store.note_used(digests)
    store._note_uses()
    store.save([digest(100), digest(101)], [0, 0])
    settle(store)
    kept = [number for number in range(19) if path_of(store, number).exists()]
    assert 10 <= len(kept) < 19 and kept == list(range(len(kept)))


def test_times_that_others_set_count_once(tmp_path):
    """A folder that was copied: modification times are times."""
    store = open_store(tmp_path, make_pool(), 10 * FILE_BYTES, "lfu")
    for number in range(8):
        store.save([digest(number)], [0])
    wait_written(store)
    os.utime(path_of(store, 3))
    os.utime(tmp_path / "lock")
    store.note_used([digest(number) for number in range(8) if number != 3] * 2)
    store._note_uses()
    store.save([digest(number) for number in range(100, 103)], [0] * 3)
    settle(store)
    assert not path_of(store, 3).exists()
    assert store._files.age() < 10


def test_what_a_crash_left_is_no_page_and_goes(tmp_path):
    folder = tmp_path / "ab"
    folder.mkdir()
    old, new = folder / "old.1-2.tmp", folder / "new.1-2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    store = open_store(tmp_path, make_pool())
    store.save([digest(1)], [0])
    settle(store)
    assert not old.exists() and new.exists()


def test_a_full_disk_costs_pages_only(tmp_path, monkeypatch):
    store = open_store(tmp_path, make_pool())
    monkeypatch.setattr(store._files, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    store.save([digest(1)], [0])
    settle(store)
    assert (store.num_saved, store.num_dropped) == (0, 1)
    assert store.load([digest(1)], [0]) == 0


def test_pages_are_left_out_when_writing_does_not_keep_up(tmp_path, monkeypatch):
    monkeypatch.setattr("memory.prefix_store._WAITING_BYTES", 3 * FILE_BYTES)
    store = open_store(tmp_path, make_pool())
    monkeypatch.setattr(store._files, "write", lambda *_: time.sleep(0.2))
    store.save([digest(number) for number in range(8)], list(range(8)))
    settle(store)
    assert store.num_dropped >= 4 and store.num_saved + store.num_dropped == 8


def test_loading_is_worthwhile_while_it_is_faster_than_computing(tmp_path, monkeypatch):
    store = open_store(tmp_path, make_pool())
    store.save([digest(1)], [0])
    settle(store)
    assert store.is_worthwhile
    store.load([digest(1)], [0])
    store.note_computed(8, 10.0)
    assert store.is_worthwhile
    for _ in range(100):
        store.note_computed(8, 1e-9)
    assert not store.is_worthwhile
    monkeypatch.setattr("memory.prefix_store._AGAIN_S", 0.0)
    assert store.is_worthwhile, "a disk that was slow once may not be any more"


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        open_store(tmp_path / "file" / "folder", make_pool())
