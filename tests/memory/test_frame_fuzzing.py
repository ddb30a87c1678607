"""Frames of every kind, right, mutated and forged, against a real receiver.

Whatever comes: pages are written only where a live lease has them, and with what was sent; other leases are untouched;
nothing outlasts its deadline; no thread ends with a traceback.
"""

import itertools
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st

from memory.frames import FrameError, Header, Kind, checksum, session_key
from memory.messages import LeaseGrant
from tests.fuzzing import MANY, QUICK, fuzz, hang_up
from tests.memory.kv_pair import CONFIG, FRAMED, LAYOUT, WAIT_S, Pair, RawSender, make_pair
from tests.memory.wrong_headers import FIELDS

pytestmark = pytest.mark.usefixtures("quiet")

LASTING = replace(CONFIG, lease_ttl_s=60.0)
NUM_BLOCKS = LAYOUT.num_layers * 2  # of a lease of two pages


@dataclass(frozen=True, slots=True)
class Step:
    """One frame of a sender: of a right conversation, changed, or bytes."""

    kind: Kind
    fields: dict[str, int]
    flips: list[tuple[int, int]]  # bytes of the frame, and what they are XORed with
    cut: int | None  # how many bytes of the frame are sent
    payload: bytes | None  # instead of the right one
    is_ours: bool  # signed with the lease's key


RIGHT = Step(Kind.DATA, {}, [], None, None, True)


def steps() -> st.SearchStrategy[Step]:
    """Mostly right."""
    kinds = st.sampled_from([Kind.DATA, Kind.DATA, Kind.DATA, Kind.PING, Kind.COMMIT, Kind.ABORT, Kind.HELLO])
    rarely = st.integers(0, 5)
    flips = rarely.flatmap(
        lambda chance: (
            st.lists(st.tuples(st.integers(0, 200), st.integers(1, 255)), max_size=3) if chance == 0 else st.just([])
        )
    )
    fields = rarely.flatmap(lambda chance: FIELDS if chance < 3 else st.just({}))
    cut = rarely.flatmap(lambda chance: st.integers(0, 300) if chance == 0 else st.none())
    payload = st.none() | greetings() | st.text(max_size=9).map(str.encode)  # the pair's callbacks take text only
    return st.builds(Step, kinds, fields, flips, cut, payload, st.integers(0, 4).map(bool))


def greetings() -> st.SearchStrategy[bytes]:
    """What HELLO could say."""
    keys = st.sampled_from(["layout", "num_pages", "codec", "segment", "x"])
    scalars = st.none() | st.booleans() | st.integers(-1, 2**40) | st.floats(allow_nan=False) | st.text(max_size=5)
    names = st.sampled_from(["zstd", "int8", "\ud800", "longctx-1-0123456789abcdef", LAYOUT.digest()])
    values = st.recursive(scalars | names, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
    return st.dictionaries(keys, values, max_size=4).map(lambda details: json.dumps(details).encode())


def frame(raw: RawSender, grant: LeaseGrant, step: Step, idx: int) -> bytes:
    """The step as bytes; the ``idx``-th DATA frame has the ``idx``-th block of the lease."""
    payload, fields = b"", {}
    if step.kind == Kind.DATA:
        layer_idx, slot = divmod(idx % NUM_BLOCKS, len(grant.pages))
        payload, fields = raw.data(layer_idx, slot, [8 + slot])
    elif step.kind == Kind.HELLO:
        payload = json.dumps(raw.payloads.hello()).encode() if step.payload is None else step.payload
    elif step.payload is not None:
        payload = step.payload
    header = Header(step.kind, grant.lease_id, grant.epoch, payload_bytes=len(payload), checksum=checksum([payload]))
    header = replace(header, **{**fields, **step.fields})
    data = bytearray(header.pack(session_key(grant.key if step.is_ours else b"x" * 32, raw.nonce)) + payload)
    for where, mask in step.flips:
        if where < len(data):
            data[where] ^= mask
    return bytes(data[: step.cut])


def scripts() -> st.SearchStrategy[list[Step]]:
    """A few steps, or all that a lease needs with a few in between."""
    few = st.lists(steps(), min_size=1, max_size=8)
    return few | st.tuples(few, st.integers(0, NUM_BLOCKS)).map(lambda drawn: insert(*drawn))


def insert(script: list[Step], where: int) -> list[Step]:
    """The script in the midst of a right conversation."""
    right = [RIGHT] * NUM_BLOCKS
    return [*right[:where], *script, *right[where:], Step(Kind.COMMIT, {}, [], None, b"tokens", True)]


class Bystander:
    """A lease of another connection, which goes on while others misbehave."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._grant = pair.grant([30, 31], request_id="bystander")
        self._raw = RawSender(pair)
        self._raw.open(self._grant)
        self._raw.send_bytes(self._raw.pack_blocks(self._grant, 0, 0, [30]))

    def check(self) -> None:
        """It is alive, and its pages hold what it sent, and nothing else."""
        self._raw.send(Kind.PING, self._grant)
        assert self._raw.answer()[0] == Kind.PONG
        target, source = self._pair.target.storage, self._pair.source.storage
        assert torch.equal(target[0, 30], source[0, 30])
        assert not target[:, 31].any() and not target[1:, 30].any()

    def close(self) -> None:
        self._raw.close()


@contextmanager
def watched_pair(name: str) -> Iterator[tuple[Pair, Bystander]]:
    """A pair with a bystander."""
    with make_pair(name, LASTING) as pair:
        bystander = Bystander(pair)
        try:
            yield pair, bystander
        finally:
            bystander.close()


def check_senders(name: str, *, num_examples: int) -> None:
    """Conversations about a lease of pages 0 and 1; pages 2 and 3 are nobody's."""
    numbers = itertools.count()
    with watched_pair(name) as (pair, bystander):

        def check(script: list[Step]) -> None:
            pair.target.storage[:, :4] = 0
            grant = pair.grant([0, 1], request_id=f"r{next(numbers)}")
            converse(pair, grant, script)
            pair.receiver.revoke(grant.request_id)
            written = pair.target.storage[:, :4].clone()
            assert not written[:, 2:].any(), "pages that nobody leased"
            ends = [pair.events.get() for _ in range(pair.events.qsize())]
            assert [request_id for _, request_id, _ in ends] in ([], [grant.request_id]), "it ends once"
            if ends and ends[0][0] == "commit" and not any(step.fields for step in script):
                assert torch.equal(written[:, :2], pair.source.storage[:, 8:10]), "committed, and not what was sent"
            bystander.check()
            assert torch.equal(pair.target.storage[:, :4], written), "written after the lease's end"

        fuzz(scripts(), check, num_examples=num_examples)


def converse(pair: Pair, grant: LeaseGrant, script: list[Step]) -> None:
    """Say HELLO and then the script, without waiting for answers; the receiver has read it all, or ended, at return."""
    raw = RawSender(pair)
    began = time.monotonic()
    try:
        with suppress(ConnectionError, TimeoutError, FrameError):
            raw.open(grant)
            blocks = itertools.count()
            for step in script:
                raw.send_bytes(frame(raw, grant, step, next(blocks) if step == RIGHT else 0))
            hang_up(raw._channel._socket)
            while True:
                raw.answer()
    finally:
        raw.close()
    assert time.monotonic() - began < WAIT_S


@pytest.mark.parametrize("name", FRAMED)
def test_senders(name: str) -> None:
    check_senders(name, num_examples=QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", FRAMED)
def test_many_senders(name: str) -> None:
    check_senders(name, num_examples=MANY)


def check_bytes(name: str, *, num_examples: int) -> None:
    """Of strangers, right after the welcome."""
    headers = st.builds(lambda fields, key: replace(Header(Kind.HELLO), **fields).pack(key), FIELDS, st.just(b"k" * 32))
    data = st.lists(headers | st.binary(max_size=100), max_size=5).map(b"".join)
    with watched_pair(name) as (pair, bystander):
        host, _, port = pair.receiver.address.rpartition(":")

        def check(data: bytes) -> None:
            with socket.create_connection((host, int(port)), timeout=WAIT_S) as stranger, suppress(ConnectionError):
                stranger.sendall(data)
                hang_up(stranger)
                while stranger.recv(1 << 16):
                    pass
            bystander.check()
            assert not pair.target.storage[:, :30].any()

        fuzz(data, check, num_examples=num_examples)


@pytest.mark.parametrize("name", FRAMED)
def test_strangers(name: str) -> None:
    check_bytes(name, num_examples=QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", FRAMED)
def test_many_strangers(name: str) -> None:
    check_bytes(name, num_examples=MANY)
