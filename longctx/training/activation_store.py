"""Where activations wait for the backward when they are not to wait in the memory that computes.

A CUDA device's wait in pinned memory of the host: they are copied there while later layers compute, and what is needed
next comes back while the backward of the layer behind it computes. A CPU's wait in a file. Both give room back as soon
as the backward has used a tensor.
"""

import tempfile
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import torch

from longctx.errors import LongctxError

PREFETCHED = 2  # tensors: one layer's input and its attention's output


class ActivationStore(Protocol):
    """What ``torch.autograd.graph.saved_tensors_hooks`` takes."""

    def pack(self, tensor: torch.Tensor) -> Any:
        """Take the tensor away; what stands for it until then."""
        ...

    def unpack(self, packed: Any) -> torch.Tensor:
        """The tensor again."""
        ...


def open_store(device: torch.device, scratch: Path) -> ActivationStore:
    """The store for activations on ``device``; ``scratch``: folder of the file, made if missing."""
    return HostStore() if device.type == "cuda" else FileStore(scratch)


class FileStore:
    """Tensors in a file of their own, which has no name and so goes with the process.

    Read and written, not mapped: pages that are mapped would count as the process's memory.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 closed with the store
        self._size = 0
        self._free: dict[int, list[int]] = defaultdict(list)  # offsets of places by their bytes
        self._num_used = 0

    def pack(self, tensor: torch.Tensor) -> "_Place":
        """Write the tensor."""
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        place = _Place(self._take(data.numel()), data.numel(), tensor.shape, tensor.dtype)
        weakref.finalize(place, self._give_back, place.offset, place.num_bytes)
        try:
            self._file.seek(place.offset)
            _transfer(self._file.write, data)
        except OSError as error:
            raise LongctxError(
                f"train.activation_offload: writing {data.numel()} bytes of activations into {self._folder} failed: "
                f"{error.strerror}"
            ) from error
        return place

    def unpack(self, packed: "_Place") -> torch.Tensor:
        """Read it."""
        data = torch.empty(packed.num_bytes, dtype=torch.uint8)
        self._file.seek(packed.offset)
        _transfer(self._file.readinto, data)
        return data.view(packed.dtype).view(packed.shape)

    def _take(self, num_bytes: int) -> int:
        self._num_used += 1
        if self._free[num_bytes]:
            return self._free[num_bytes].pop()
        offset, self._size = self._size, self._size + num_bytes
        return offset

    def _give_back(self, offset: int, num_bytes: int) -> None:
        self._num_used -= 1
        self._free[num_bytes].append(offset)
        if not self._num_used:  # after every step: what lengths come next is open
            self._free.clear()
            self._size = 0
            self._file.truncate(0)


class _Place:
    """Where a tensor is in the file."""

    __slots__ = ("__weakref__", "dtype", "num_bytes", "offset", "shape")

    def __init__(self, offset: int, num_bytes: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self.offset, self.num_bytes, self.shape, self.dtype = offset, num_bytes, shape, dtype


def _transfer(call: Any, data: torch.Tensor) -> None:
    """All bytes; the system moves at most 2 GiB in one call."""
    view = data.numpy().data
    while len(view):
        moved = call(view)
        if not moved:
            raise OSError(0, "the file ends early")
        view = view[moved:]


class HostStore:
    """Tensors in pinned memory, copied on a stream of its own; CUDA only."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._waiting: list[weakref.ref[_Copy]] = []  # in the order of the forward

    def pack(self, tensor: torch.Tensor) -> "_Copy":
        """Start copying the tensor to the host."""
        tensor = tensor.detach()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        copy = _Copy(host, tensor.device)
        self._waiting.append(weakref.ref(copy))
        return copy

    def unpack(self, packed: "_Copy") -> torch.Tensor:
        """The tensor on the device; those that the backward needs next are on their way from now on."""
        tensor = self._fetch(packed)
        torch.cuda.current_stream().wait_stream(self._stream)
        tensor.record_stream(torch.cuda.current_stream())
        packed.back = None
        self._waiting = [ref for ref in self._waiting if ref() not in (None, packed)]
        for ref in self._waiting[-PREFETCHED:]:
            copy = ref()
            if copy is not None:
                self._fetch(copy)
        return tensor

    def _fetch(self, copy: "_Copy") -> torch.Tensor:
        if copy.back is None:
            with torch.cuda.stream(self._stream):
                copy.back = copy.host.to(copy.device, non_blocking=True)
        return copy.back


class _Copy:
    """A tensor on the host, and on the device once it is on its way back."""

    __slots__ = ("__weakref__", "back", "device", "host")

    def __init__(self, host: torch.Tensor, device: torch.device) -> None:
        self.host, self.device = host, device
        self.back: torch.Tensor | None = None
