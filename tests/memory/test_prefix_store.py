"""Pages of prefixes in a folder: what was saved is found, by others too; what is damaged is not; and it stays small."""

import os
import time

import pytest
import torch

from memory.layout import KVLayout
from memory.pages import PagePool
from memory.prefix_store import PrefixStore

LAYOUT = KVLayout(3, 2, 4, 8, "float32", "hnd")
FILE_BYTES = LAYOUT.page_bytes + 48


def make_pool(seed=0, num_pages=8):
    pool = PagePool(LAYOUT, num_pages)
    pool.storage.copy_(torch.randint(0, 256, pool.storage.shape, generator=torch.Generator().manual_seed(seed)))
    return pool


def digest(number):
    return number.to_bytes(16, "big")


def open_store(folder, pool, max_bytes=1 << 30):
    return PrefixStore(folder, pool, max_bytes=max_bytes)


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


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another's", "longer"])
def test_damaged_pages_are_deleted_and_not_used(tmp_path, damage):
    store = open_store(tmp_path, make_pool(1))
    store.save([digest(1), digest(2)], [0, 1])
    settle(store)
    path = store._path(digest(1))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-1]
    elif damage == "flipped":
        data[100] ^= 1
    elif damage == "empty":
        data = bytearray()
    elif damage == "another's":
        data = bytearray(store._path(digest(2)).read_bytes())
    else:
        data += b"0"
    path.write_bytes(data)
    pool = make_pool(2)
    other = open_store(tmp_path, pool)
    assert other.load([digest(1), digest(2)], [0, 1]) == 0
    assert torch.equal(pool.storage, make_pool(2).storage)
    assert not path.exists() and other.num_damaged == 1
    other.save([digest(1)], [3])
    settle(other)
    assert path.exists()


def test_the_folder_stays_within_its_bounds_and_keeps_what_was_used_last(tmp_path):
    most = 10 * FILE_BYTES
    store = open_store(tmp_path, make_pool(), most)
    for number in range(40):
        store.save([digest(number)], [0])
        while store._waiting_bytes:
            time.sleep(0.001)
        path = store._path(digest(number))
        os.utime(path, (number, number))
        os.utime(store._path(digest(0)), (number, number))  # used again and again
        assert sum(each.stat().st_size for each in tmp_path.rglob("*.kv")) <= most
    settle(store)
    kept = sorted(int(each.stem, 16) for each in tmp_path.rglob("*.kv"))
    assert kept[0] == 0 and kept[1:] == list(range(41 - len(kept), 40))
    assert len(kept) >= 8


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
    monkeypatch.setattr(store, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    store.save([digest(1)], [0])
    settle(store)
    assert (store.num_saved, store.num_dropped) == (0, 1)
    assert store.load([digest(1)], [0]) == 0


def test_pages_are_left_out_when_writing_does_not_keep_up(tmp_path, monkeypatch):
    monkeypatch.setattr("memory.prefix_store._WAITING_BYTES", 3 * FILE_BYTES)
    store = open_store(tmp_path, make_pool())
    monkeypatch.setattr(store, "_write", lambda *_: time.sleep(0.2))
    store.save([digest(number) for number in range(8)], list(range(8)))
    settle(store)
    assert store.num_dropped >= 4 and store.num_saved + store.num_dropped == 8


def test_loading_is_worthwhile_while_it_is_faster_than_computing(tmp_path):
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


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        open_store(tmp_path / "file" / "folder", make_pool())
