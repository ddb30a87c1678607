"""The most bytes of tensors that were alive at one time, counted as torch makes them: the same in every run."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While it is entered: ``peak_bytes`` of storages that were made since, on the thread that entered it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self.largest_bytes = self._bytes = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                is_real = storage.device.type != "meta"
                if is_real and id(storage) not in self._seen and id(storage) not in inputs:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._seen.add(id(storage))
        weakref.finalize(storage, self._remove, id(storage), storage.nbytes())
        self._bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        self.largest_bytes = max(self.largest_bytes, storage.nbytes())

    def _remove(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self._bytes -= num_bytes
