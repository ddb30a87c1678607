"""Tensors come back from a file as they were, and the file takes no more room than what waits in it."""

import os
from types import SimpleNamespace

import pytest
import torch

from longctx.errors import LongctxError
from longctx.training.activation_store import FileStore, HostStore


def file_size(store: FileStore) -> int:
    return os.fstat(store._file.fileno()).st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_come_back(tmp_path, dtype):
    store = FileStore(tmp_path / "scratch")
    tensors = [torch.randn(1, 7 + index, 4).to(dtype) for index in range(3)] + [torch.randn(6, 5).to(dtype).T]
    places = [store.pack(tensor) for tensor in tensors]
    for tensor, place in reversed(list(zip(tensors, places, strict=True))):
        assert torch.equal(store.unpack(place), tensor)
        assert torch.equal(store.unpack(place), tensor)
    assert list((tmp_path / "scratch").iterdir()) == []  # nothing stays behind


def test_room_is_given_back(tmp_path):
    store, tensor = FileStore(tmp_path), torch.ones(256)
    first, second = store.pack(tensor), store.pack(2 * tensor)
    assert file_size(store) == 2048
    del first
    third = store.pack(3 * tensor)
    assert file_size(store) == 2048
    assert store.unpack(second)[0] == 2 and store.unpack(third)[0] == 3
    del second, third
    assert file_size(store) == 0


def test_a_full_disk_is_named(tmp_path):
    store = FileStore(tmp_path)

    def write(_):
        raise OSError(28, "No space left on device")

    store._file = SimpleNamespace(seek=lambda _: None, write=write, truncate=lambda _: None)
    with pytest.raises(LongctxError, match=r"activation_offload: writing 1024 bytes .* No space left on device"):
        store.pack(torch.ones(256))


@pytest.mark.gpu
def test_tensors_come_back_from_the_host():
    store = HostStore()
    tensors = [torch.randn(1, 2**18, device="cuda") for _ in range(6)]
    copies = [store.pack(tensor) for tensor in tensors]
    for tensor, copy in reversed(list(zip(tensors, copies, strict=True))):
        assert copy.host.is_pinned()
        assert torch.equal(store.unpack(copy), tensor)
