"""What KV blocks are on the wire, where ``transport.codec`` wants them smaller than they are in pages.

``zstd`` gives back every bit: the bytes of the elements lie in planes (all first bytes, all second bytes, ...), and the
plane with sign and exponent has few different values. The others lose bits and say so: ``bfloat16`` rounds float32
elements, ``int8`` keeps one scale for each ``head_dim`` consecutive elements (in a page of order ``hnd`` or ``nhd`` one
head's key or value of one token) and rounds to 1/127 of the largest of them, an error of 0.4 % of it at most.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
import zstandard

from memory.frames import Buffer
from memory.layout import ELEMENT_SIZES, KVLayout
from memory.pages import DTYPES
from parallel.registry import Registry

_LEVEL = 1  # of zstd: higher ones gain little on numbers and are slower than the networks that need a codec
INT8_STEPS = 127


class CodecError(ValueError):
    """A payload is not what its codec makes of so many bytes, or the blocks are not what it can encode."""


class Codec(ABC):
    """Turns blocks of one layout into a payload and back. Holds no state: any thread may call it.

    Raises ``ValueError`` if it has nothing to do for the layout's element type.
    """

    name: str  # in CODECS
    is_lossless: bool

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout

    @abstractmethod
    def encode(self, blocks: np.ndarray) -> bytes:
        """The payload of uint8 ``[num_bytes]``, a whole number of blocks. Raises ``CodecError``."""

    @abstractmethod
    def decode(self, payload: Buffer, num_bytes: int) -> np.ndarray:
        """uint8 ``[num_bytes]``. Raises ``CodecError`` if the payload does not hold exactly these."""

    @abstractmethod
    def limit(self, num_bytes: int) -> int:
        """The largest payload there can be for so many bytes of blocks."""


class Zstd(Codec):
    """Planes of bytes under zstd."""

    name = "zstd"
    is_lossless = True

    def __init__(self, layout: KVLayout) -> None:
        super().__init__(layout)
        self._size = ELEMENT_SIZES[layout.dtype]

    def encode(self, blocks: np.ndarray) -> bytes:
        planes = np.ascontiguousarray(blocks.reshape(-1, self._size).T)
        return zstandard.ZstdCompressor(level=_LEVEL).compress(planes.data)

    def decode(self, payload: Buffer, num_bytes: int) -> np.ndarray:
        try:
            if zstandard.frame_content_size(payload) != num_bytes:  # before memory is taken for it
                raise CodecError(f"a zstd payload that does not say that it holds {num_bytes} bytes")
            raw = zstandard.ZstdDecompressor().decompress(payload)
        except zstandard.ZstdError as error:
            raise CodecError(f"a zstd payload cannot be read: {error}") from None
        return np.frombuffer(raw, dtype=np.uint8).reshape(self._size, -1).T.reshape(-1)

    def limit(self, num_bytes: int) -> int:
        return num_bytes + (num_bytes >> 7) + 1024  # above zstd's own bound


class BFloat16(Codec):
    """float32 elements rounded to bfloat16."""

    name = "bfloat16"
    is_lossless = False

    def __init__(self, layout: KVLayout) -> None:
        super().__init__(layout)
        if layout.dtype != "float32":
            raise ValueError(f"transport.codec=bfloat16 makes float32 KV smaller; this model's KV is {layout.dtype}")

    def encode(self, blocks: np.ndarray) -> bytes:
        values = torch.from_numpy(blocks).view(torch.float32)
        return values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()

    def decode(self, payload: Buffer, num_bytes: int) -> np.ndarray:
        if len(payload) != self.limit(num_bytes):
            raise CodecError(f"{len(payload)} bytes of bfloat16 for {num_bytes} bytes of float32")
        values = torch.frombuffer(bytearray(payload), dtype=torch.bfloat16)
        return values.float().view(torch.uint8).numpy()

    def limit(self, num_bytes: int) -> int:
        return num_bytes // 2


class Int8(Codec):
    """One float32 scale and ``head_dim`` steps of it."""

    name = "int8"
    is_lossless = False

    def __init__(self, layout: KVLayout) -> None:
        super().__init__(layout)
        self._dtype = DTYPES[layout.dtype]

    def encode(self, blocks: np.ndarray) -> bytes:
        values = torch.from_numpy(blocks).view(self._dtype).view(-1, self.layout.head_dim).float()
        scales = values.abs().amax(1, keepdim=True) / INT8_STEPS
        if not torch.isfinite(scales).all():
            raise CodecError("KV has values that are not finite, which transport.codec=int8 cannot say")
        steps = (values / scales.where(scales > 0, 1)).round_().to(torch.int8)
        return scales.numpy().tobytes() + steps.numpy().tobytes()

    def decode(self, payload: Buffer, num_bytes: int) -> np.ndarray:
        if len(payload) != self.limit(num_bytes):
            raise CodecError(f"{len(payload)} bytes of int8 for {num_bytes} bytes of {self.layout.dtype}")
        num_rows = num_bytes // self.layout.row_bytes
        raw = bytearray(payload)
        scales = torch.frombuffer(raw, dtype=torch.float32, count=num_rows).view(-1, 1)
        steps = torch.frombuffer(raw, dtype=torch.int8, offset=4 * num_rows).view(num_rows, -1)
        return (steps * scales).to(self._dtype).view(torch.uint8).view(-1).numpy()

    def limit(self, num_bytes: int) -> int:
        return num_bytes // self.layout.row_bytes * (4 + self.layout.head_dim)


CODECS = Registry(
    "codec", {"zstd": "memory.codecs:Zstd", "bfloat16": "memory.codecs:BFloat16", "int8": "memory.codecs:Int8"}
)


def make_codec(name: str, layout: KVLayout) -> Codec | None:
    """The codec called ``name``; None for ``none``. Raises ``ValueError`` if there is none or it does not fit."""
    return None if name == "none" else CODECS.get(name)(layout)


def concatenate(buffers: Sequence[Buffer]) -> np.ndarray:
    """The buffers' bytes, uint8; a copy only if there are several."""
    arrays = [np.frombuffer(buffer, dtype=np.uint8) for buffer in buffers]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
