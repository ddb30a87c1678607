"""Bytes that are no header, and payloads that no codec made, are refused; nothing is read past their end."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.codecs import CODECS, CodecError
from memory.frames import HEADER_BYTES, FrameError, Header
from memory.layout import KVLayout
from tests.fuzzing import MANY, QUICK, fuzz


def check_codecs(name: str, dtype: str, *, num_examples: int) -> None:
    """A payload that is none is refused; what is decoded has the size that was asked for."""
    layout = KVLayout(1, 2, 4, 4, dtype, "hnd")
    codec = CODECS.get(name)(layout)
    num_bytes = 2 * layout.block_bytes
    right = codec.encode(np.arange(num_bytes, dtype=np.uint8) // 3)

    def check(drawn: tuple[bytes, list[tuple[int, int]], int]) -> None:
        payload, flips, cut = bytearray(drawn[0]), drawn[1], drawn[2]
        for where, mask in flips:
            if where < len(payload):
                payload[where] ^= mask
        with suppress(CodecError):
            blocks = codec.decode(payload[: len(payload) - cut], num_bytes)
            assert (blocks.dtype, blocks.shape) == (np.uint8, (num_bytes,))

    flips = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 255)), max_size=4)
    payloads = st.just(right) | st.binary(max_size=600) | st.binary(max_size=60).map(lambda tail: right + tail)
    fuzz(st.tuples(payloads, flips, st.integers(0, 3)), check, num_examples=num_examples)


CODEC_CASES = [("zstd", "float32"), ("zstd", "bfloat16"), ("bfloat16", "float32"), ("int8", "float16")]


@pytest.mark.parametrize("name, dtype", CODEC_CASES)
def test_payloads_of_codecs(name: str, dtype: str) -> None:
    check_codecs(name, dtype, num_examples=QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", CODEC_CASES)
def test_many_payloads_of_codecs(name: str, dtype: str) -> None:
    check_codecs(name, dtype, num_examples=5 * MANY)


@given(raw=st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), is_answer=st.booleans())
@settings(derandomize=True)
def test_headers(raw: bytes, is_answer: bool) -> None:
    """Most bytes are no header; one that is says what was packed."""
    for data in (raw, b"LCKV\x01" + raw[5:6] + bytes(2) + raw[8:]):
        with suppress(FrameError):
            header = Header.unpack(data, is_answer=is_answer)
            assert header.pack(b"")[:48] == data[:48]
