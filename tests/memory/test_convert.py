"""Blocks in every element type and order, made into every other."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from memory.convert import can_convert, convert
from memory.layout import ELEMENT_SIZES, ORDERS, KVLayout
from memory.pages import DTYPES, PagePool
from memory.transport import TRANSPORTS
from tests.memory.kv_pair import CONFIG, make_pair

KINDS = list(itertools.product(ELEMENT_SIZES, ORDERS))


def make_layout(kind: tuple[str, str], *, has_landmark: bool = True) -> KVLayout:
    return KVLayout(1, 2, 8, 4, *kind, has_landmark)


@pytest.mark.parametrize("source_kind", KINDS)
@pytest.mark.parametrize("target_kind", KINDS)
def test_there_and_back(source_kind: tuple[str, str], target_kind: tuple[str, str]) -> None:
    source, target = make_layout(source_kind), make_layout(target_kind)
    assert can_convert(source, target)
    values = torch.randint(-64, 65, (3 * source.block_bytes // ELEMENT_SIZES[source.dtype],)).to(DTYPES[source.dtype])
    blocks = values.view(torch.uint8).numpy()
    there = convert(blocks, source, target)
    assert len(there) == 3 * target.block_bytes
    assert np.array_equal(convert(there, target, source), blocks)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ELEMENT_SIZES)
def test_where_each_element_goes(dtype: str, order: str) -> None:
    """By the shapes that attention sees (``PagePool.views``)."""
    source, target = make_layout(("float32", "hnd")), make_layout((dtype, order))
    ours, theirs = PagePool(source, 3), PagePool(target, 3)
    for part, pool_view in enumerate(ours.views(0)):
        pool_view.copy_(torch.arange(pool_view.numel()).view_as(pool_view) % 97 + 100 * part)
    ours.landmarks.copy_(torch.arange(ours.landmarks.numel()).view_as(ours.landmarks))
    theirs.storage.view(-1).copy_(torch.from_numpy(convert(ours.storage.view(-1).numpy(), source, target)))
    keys, values = (view.float() for view in theirs.views(0))
    if order == "nhd":
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    elif order == "paired":
        keys = keys.transpose(2, 3).reshape(3, 2, 4, 8)
        values = values.transpose(3, 4).reshape(3, 2, 4, 8)
    assert torch.equal(keys, ours.views(0)[0]) and torch.equal(values, ours.views(0)[1])
    assert torch.equal(theirs.landmarks.float(), ours.landmarks)


def test_refusals() -> None:
    base = make_layout(("float32", "hnd"))
    for other in (
        KVLayout(2, 2, 8, 4, "float32", "hnd", True),
        KVLayout(1, 2, 8, 16, "float32", "hnd", True),
        make_layout(("bfloat16", "hnd"), has_landmark=False),
    ):
        assert not can_convert(base, other)
    large = np.full(base.block_bytes // 4, 1e6, dtype=np.float32).view(np.uint8)
    with pytest.raises(ValueError, match="float16"):
        convert(large, base, make_layout(("float16", "hnd")))


@pytest.mark.parametrize("codec", ["none", "zstd", "int8"])
def test_shipped(codec: str) -> None:
    """From bfloat16 pages in one order to float32 pages in another, and back."""
    narrow, wide = make_layout(("bfloat16", "paired")), make_layout(("float32", "nhd"))
    config = replace(CONFIG, codec=codec)
    for ours, theirs in ((narrow, wide), (wide, narrow)):
        source = PagePool(ours, 8)
        source.storage.view(DTYPES[ours.dtype]).copy_(
            torch.randn(source.storage.numel() // ELEMENT_SIZES[ours.dtype]).view_as(
                source.storage.view(DTYPES[ours.dtype])
            )
        )
        with make_pair("tcp", config, layout=theirs, num_pages=8) as pair:
            sender = TRANSPORTS.get("tcp").make_sender(source, config)
            stream = sender.open(
                pair.grant([5, 2]), on_acked=lambda pair=pair: pair.answers.put(("acked",)), on_failed=print
            )
            stream.send(0, [0, 1], [3, 4])
            stream.commit(b"")
            assert pair.answer() == ("acked",)
            sender.close()
            came = pair.target.storage[0, [5, 2]].reshape(-1).numpy()
            expected = convert(source.storage[0, [3, 4]].reshape(-1).numpy(), ours, theirs)
            values, right = (torch.from_numpy(each).view(DTYPES[theirs.dtype]).float() for each in (came, expected))
            assert torch.allclose(values, right, rtol=0.01, atol=0.03 if codec == "int8" else 0.0)


def test_transports_that_cannot() -> None:
    layout = make_layout(("bfloat16", "hnd"))
    with make_pair("shared_memory", layout=make_layout(("float32", "hnd"))) as pair:
        transport = TRANSPORTS.get("shared_memory")
        sender = transport.make_sender(transport.allocate(layout, 4), CONFIG)
        with pytest.raises(ValueError, match="cannot change the KV dtype, tcp can"):
            sender.open(pair.grant([0]), on_acked=print, on_failed=print)
        sender.close()
