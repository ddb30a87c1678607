"""Codecs: what comes back, how far off it is, how small it was, and what is refused."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from memory.codecs import CODECS, INT8_STEPS, Codec, CodecError, make_codec
from memory.config import CODEC_NAMES, TransportConfig
from memory.frames import Kind
from memory.layout import ELEMENT_SIZES, ORDERS, KVLayout
from memory.pages import DTYPES
from memory.tensor_blocks import word_sum
from tests.memory.kv_pair import CONFIG, LAYOUT, make_pair, make_raw, ship

LAYOUTS = [
    KVLayout(2, 2, 32, 16, dtype, order, has_landmark)
    for dtype, order, has_landmark in itertools.product(ELEMENT_SIZES, ORDERS, (False, True))
]
FITTING = [(name, layout) for name in CODECS for layout in LAYOUTS if name != "bfloat16" or layout.dtype == "float32"]


def make_blocks(layout: KVLayout, count: int = 3) -> np.ndarray:
    """Blocks of values as KV has them, uint8 ``[num_bytes]``."""
    values = torch.randn(count * layout.block_bytes // ELEMENT_SIZES[layout.dtype], generator=torch.manual_seed(1))
    values[: layout.head_dim] = 0
    return values.to(DTYPES[layout.dtype]).view(torch.uint8).numpy()


def values_of(blocks: np.ndarray, layout: KVLayout) -> torch.Tensor:
    """float32 ``[num_rows, head_dim]``."""
    return torch.from_numpy(blocks.copy()).view(DTYPES[layout.dtype]).view(-1, layout.head_dim).float()


@pytest.mark.parametrize("name, layout", FITTING)
def test_round_trip(name: str, layout: KVLayout) -> None:
    codec: Codec = CODECS.get(name)(layout)
    blocks = make_blocks(layout)
    payload = codec.encode(blocks)
    assert len(payload) <= codec.limit(len(blocks))
    back = codec.decode(payload, len(blocks))
    before, after = values_of(blocks, layout), values_of(back, layout)
    if codec.is_lossless:
        assert np.array_equal(back, blocks)
    elif name == "bfloat16":
        assert torch.equal(after, before.bfloat16().float())
    else:
        largest = before.abs().amax(1, keepdim=True)
        rounding = 2.0**-8 * before.abs() if layout.dtype == "bfloat16" else 1e-3 * before.abs()
        assert ((before - after).abs() <= largest / INT8_STEPS / 2 * 1.01 + rounding).all()


def test_sizes() -> None:
    """What each saves of such values."""
    for dtype, name, share in (
        ("float32", "zstd", 0.93),
        ("bfloat16", "zstd", 0.8),
        ("float32", "bfloat16", 0.5),
        ("float32", "int8", 0.29),
        ("bfloat16", "int8", 0.57),
    ):
        layout = replace(LAYOUTS[0], dtype=dtype)
        blocks = make_blocks(layout, 40)
        assert len(CODECS.get(name)(layout).encode(blocks)) <= share * len(blocks)


@pytest.mark.parametrize("name, layout", FITTING)
def test_what_is_no_payload(name: str, layout: KVLayout) -> None:
    codec: Codec = CODECS.get(name)(layout)
    blocks = make_blocks(layout)
    payload = codec.encode(blocks)
    for wrong in (b"", payload[:-1], bytes(len(payload))):
        try:
            assert len(codec.decode(wrong, len(blocks))) == len(blocks)  # zeros are values
        except CodecError:
            continue
    with pytest.raises(CodecError):
        codec.decode(payload, 2 * len(blocks))


def test_values_that_are_not_finite() -> None:
    blocks = make_blocks(LAYOUTS[0])
    blocks.view(np.float32)[5] = np.inf
    with pytest.raises(CodecError, match="not finite"):
        CODECS.get("int8")(LAYOUTS[0]).encode(blocks)


def test_refusals() -> None:
    assert sorted(CODEC_NAMES) == sorted(["none", *CODECS])
    assert make_codec("none", LAYOUT) is None
    with pytest.raises(ValueError, match="float32 KV smaller; this model's KV is bfloat16"):
        make_codec("bfloat16", replace(LAYOUT, dtype="bfloat16"))
    with pytest.raises(ValueError, match="codecs are for tcp"):
        TransportConfig(name="shared_memory", codec="zstd")


@pytest.mark.parametrize("name", list(CODECS))
def test_shipped(name: str) -> None:
    with make_pair("tcp", replace(CONFIG, codec=name)) as pair:
        pair.source.storage.view(torch.float32).normal_()
        ship(pair.open(pair.grant([5, 3, 4])), [1, 2, 9])
        assert pair.answer() == ("acked", "r")
        came = pair.target.storage[:, [5, 3, 4]].view(torch.float32)
        sent = pair.source.storage[:, [1, 2, 9]].view(torch.float32)
        tolerance = 0.0 if name == "zstd" else 0.03
        assert torch.allclose(came, sent, rtol=0, atol=tolerance)
        others = [page for page in range(32) if page not in (3, 4, 5)]
        assert not pair.target.storage[:, others].any()


def test_a_stream_whose_pages_cannot_be_sent() -> None:
    """It fails on both sides with the reason; others on the connection go on."""
    with make_pair("tcp", replace(CONFIG, codec="int8")) as pair:
        pair.source.storage.view(torch.float32).normal_()
        pair.source.storage.view(torch.float32)[0, 7, 0] = torch.nan
        bad, good = pair.open(pair.grant([0], request_id="bad")), pair.open(pair.grant([1], request_id="good"))
        ship(bad, [7])
        ship(good, [8])
        answers, events = [pair.answer(), pair.answer()], [pair.event(), pair.event()]
        assert ("acked", "good") in answers and ("commit", "good", "") in events
        assert all("not finite" in entry[2] for entry in (*answers, *events) if entry[0] == "failed")


@pytest.mark.parametrize("codec", ["zstd", "int8"])
def test_a_payload_that_lies(codec: str) -> None:
    with make_pair("tcp", replace(CONFIG, codec=codec)) as pair, make_raw(pair) as raw:
        grant = pair.grant([0])
        raw.open(grant)
        payload = b"\x28\xb5\x2f\xfd" + bytes(40)
        raw.send(Kind.DATA, grant, payload, num_pages=1)
        assert pair.event()[0] == "failed"
        assert pair.is_untouched()


def test_an_unknown_codec() -> None:
    with make_pair("tcp") as pair, make_raw(pair) as raw:
        raw.payloads.hello = lambda: {"layout": LAYOUT.digest(), "codec": "rot13"}  # type: ignore[method-assign]
        grant = pair.grant([0])
        raw.send(Kind.HELLO, grant, b'{"layout": "%s", "codec": "rot13"}' % LAYOUT.digest().encode())
        assert "allowed: bfloat16, int8, zstd" in pair.event()[2]


def test_word_sum() -> None:
    blocks = torch.randint(0, 256, (8 * 50 + 3,), dtype=torch.uint8)
    whole = word_sum(blocks)
    swapped = torch.cat([blocks[8:16], blocks[:8], blocks[16:]])
    altered = blocks.clone()
    altered[77] ^= 1
    assert len({whole, word_sum(swapped), word_sum(altered), word_sum(blocks[:-1])}) == 4
    assert 0 <= whole < 1 << 64
