"""Every transport: what ends a lease for one of its senders ends it for all, at once, and nothing is written after it.

Pings are slower than any wait here unless a test says otherwise: what a sender hears, it hears unasked.
"""

import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from memory.frames import Kind
from memory.layout import KVLayout
from memory.messages import LeaseGrant
from tests.memory.kv_pair import CONFIG, FRAMED, LAYOUT, WAIT_S, Pair, RawSender, make_pair, make_raw, make_raws

NO_PINGS = replace(CONFIG, lease_ttl_s=100 * WAIT_S, send_timeout_s=100 * WAIT_S)


def send_twice(pair: Pair, raw: RawSender, grant: LeaseGrant) -> None:
    """A block that another sender has sent."""
    raw.send_bytes(raw.pack_blocks(grant, 0, 1, [9]))


def send_after_commit(pair: Pair, raw: RawSender, grant: LeaseGrant) -> None:
    """A block after having said that all were sent."""
    raw.send(Kind.COMMIT, grant)
    raw.send_bytes(raw.pack_blocks(grant, 0, 0, [9]))


def commit_twice(pair: Pair, raw: RawSender, grant: LeaseGrant) -> None:
    """In the place of a sender that has not committed."""
    raw.send(Kind.COMMIT, grant)
    raw.send(Kind.COMMIT, grant)


def send_garbage(pair: Pair, raw: RawSender, grant: LeaseGrant) -> None:
    """No frame at all."""
    raw.send_bytes(b"x" * 64)


FAULTS: dict[str, tuple[Callable[[Pair, RawSender, LeaseGrant], None], str]] = {
    "abort": (lambda pair, raw, grant: raw.send(Kind.ABORT, grant, b"the client left"), "the client left"),
    "death": (lambda pair, raw, grant: raw.close(), "the sender is gone"),
    "garbage": (send_garbage, "the sender is gone"),
    "wrong frame": (lambda pair, raw, grant: raw.send(Kind.DATA, grant, num_pages=7), "not in the lease"),
    "slot sent twice": (send_twice, "sent before"),
    "opened twice": (lambda pair, raw, grant: raw.send(Kind.HELLO, grant, b"{}"), "opened the lease twice"),
    "committed twice": (commit_twice, "committed twice"),
    "sent after commit": (send_after_commit, "after its commit"),
    "second payload": (lambda pair, raw, grant: raw.send(Kind.COMMIT, grant, b"tokens"), "with a payload"),
    "revoked": (lambda pair, raw, grant: pair.receiver.revoke("r"), "revoked"),
}


@pytest.mark.parametrize("name", FRAMED)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_one_fails_all(name: str, fault: str) -> None:
    """Of three senders one does wrong, one has committed, and one is in between."""
    do_wrong, message = FAULTS[fault]
    with make_pair(name, NO_PINGS, num_senders=3) as pair:
        grant = pair.grant([4, 5, 6])
        with make_raw(pair) as raw:
            raw.open(grant)
            streams = {sender_idx: pair.open(grant, sender_idx) for sender_idx in (1, 2)}
            for sender_idx, stream in streams.items():
                for layer_idx in range(LAYOUT.num_layers):
                    stream.send(layer_idx, [sender_idx], [sender_idx])
            streams[1].commit(b"first tokens")
            wait_until_committed(pair, grant, num_committed=1, num_blocks=2 * LAYOUT.num_layers)
            do_wrong(pair, raw, grant)
            for sender_idx in (1, 2):
                kind, _, reason = pair.answer(sender_idx)
                assert kind == "failed"
                assert message in reason
            if fault != "revoked":
                kind, request_id, reason = pair.event()
                assert (kind, request_id) == ("failed", "r")
                assert message in reason
            assert pair.receiver.num_leases == 0
            pair.target.storage.fill_(7)  # somebody else's from now on
            if fault not in ("death", "garbage"):
                assert message in raw.answer()[1].decode()
                raw.send_bytes(raw.pack_blocks(grant, 0, 0, [0]))
                kind, reason = raw.answer()
                assert kind == Kind.NACK
            streams[2].send(0, [0], [0])
            assert pair.is_silent()
            assert (pair.target.storage == 7).all()


def wait_until_committed(pair: Pair, grant: LeaseGrant, *, num_committed: int, num_blocks: int) -> None:
    """Wait until so many senders have committed and so much has arrived."""
    deadline = time.monotonic() + WAIT_S
    lease = pair.receiver._leases.find(grant.lease_id)
    while lease.num_committed < num_committed or pair.receiver.bytes_received < num_blocks * LAYOUT.block_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", FRAMED)
@pytest.mark.parametrize("has_opened", [True, False])
def test_one_sender_freezes(name: str, has_opened: bool) -> None:
    """It is silent while the others ping. While it pings as they do the lease lives, for several times to live."""
    with make_pair(name, replace(CONFIG, lease_ttl_s=1.0), num_senders=3) as pair:
        grant = pair.grant([4, 5, 6])
        with make_raw(pair) as raw:
            pair.open(grant, 1).commit(b"")
            pair.open(grant, 2)
            if has_opened:
                raw.open(grant)
                for _ in range(12):
                    time.sleep(0.2)
                    raw.send(Kind.PING, grant)
                    assert raw.answer()[0] == Kind.PONG
                assert pair.is_silent(0)
            event = ("failed", "r", "a sender made no progress for 1 s")
            assert pair.event() == event
            for sender_idx in (1, 2):
                kind, _, reason = pair.answer(sender_idx)
                assert kind == "failed"
                assert event[2] in reason
            if has_opened:
                assert raw.answer() == (Kind.NACK, event[2].encode())
            assert pair.receiver.num_leases == 0
            assert pair.is_silent()


@pytest.mark.parametrize("name", FRAMED)
def test_a_sender_freezes_inside_a_frame(name: str) -> None:
    """Its blocks may be half written; the rest of them must not be, whenever it comes."""
    with make_pair(name, NO_PINGS, num_senders=2) as pair:
        grant = pair.grant([4, 5])
        with make_raws(pair, grant) as (slow, other):
            frame = slow.pack_blocks(grant, 0, 0, [9, 8])
            slow.send_bytes(frame[:-5])
            time.sleep(0.1)
            other.send(Kind.ABORT, grant, b"gave up")
            assert pair.event() == ("failed", "r", "gave up")
            assert other.answer() == (Kind.NACK, b"gave up")
            pair.target.storage.fill_(7)
            slow.send_bytes(frame[-5:])
            assert slow.answer() == (Kind.NACK, b"gave up")
            assert (pair.target.storage == 7).all()
            assert pair.is_silent()


@pytest.mark.parametrize("name", FRAMED)
def test_a_late_sender(name: str) -> None:
    """The lease has failed before it says HELLO."""
    with make_pair(name, NO_PINGS, num_senders=2) as pair:
        grant = pair.grant([4])
        pair.open(grant, 0).abort("gave up")
        assert pair.event() == ("failed", "r", "gave up")
        stream = pair.open(grant, 1)
        stream.send(0, [0], [1])
        assert "never granted" in pair.answer(1)[2]
        assert pair.is_untouched()
        assert pair.is_silent()


@pytest.mark.parametrize("name", FRAMED)
def test_commit_with_missing_blocks(name: str) -> None:
    """Known when the last one commits, not before."""
    with make_pair(name, NO_PINGS, num_senders=3) as pair:
        streams = pair.open_all(pair.grant([4, 5, 6]))
        for sender_idx, stream in enumerate(streams):
            for layer_idx in range(LAYOUT.num_layers - (sender_idx == 1)):
                stream.send(layer_idx, [sender_idx], [9])
        streams[0].commit(b"")
        streams[1].commit(b"")
        assert pair.is_silent()
        streams[2].commit(b"")
        assert pair.event() == ("failed", "r", "commit with 1 blocks missing")
        for sender_idx in range(3):
            kind, _, reason = pair.answer(sender_idx)
            assert kind == "failed"
            assert "commit with 1 blocks missing" in reason
        assert pair.is_silent()


@pytest.mark.parametrize("name", FRAMED)
def test_receiver_closes(name: str) -> None:
    with make_pair(name, NO_PINGS, num_senders=3) as pair:
        streams = pair.open_all(pair.grant([4]))
        streams[0].commit(b"")
        assert pair.is_silent()
        pair.receiver.close()
        assert [pair.answer(sender_idx)[0] for sender_idx in range(3)] == ["failed"] * 3
        assert pair.is_silent()


@pytest.mark.parametrize("name", FRAMED)
@pytest.mark.parametrize("delay_s", [0.001, 0.003, 0.01])
def test_revoke_fences_every_sender(name: str, delay_s: float) -> None:
    """All of them write when the lease is revoked."""
    layout = KVLayout(4, 8, 64, 32, "float32", "hnd")  # blocks of 128 KiB, 32 MiB in all
    with make_pair(name, layout=layout, num_pages=64, num_senders=4) as pair:
        for sender_idx, stream in enumerate(pair.open_all(pair.grant(range(64)))):
            for layer_idx in range(4):
                stream.send(layer_idx, range(sender_idx, 64, 4), range(sender_idx, 64, 4))
        time.sleep(delay_s)
        pair.receiver.revoke("r")
        pair.target.storage.fill_(0)
        assert [pair.answer(sender_idx)[0] for sender_idx in range(4)] == ["failed"] * 4
        assert pair.is_untouched()
        assert pair.events.empty()


@pytest.mark.parametrize("name", FRAMED)
@pytest.mark.parametrize("seed", range(6))
def test_a_fault_at_any_time(name: str, seed: int) -> None:
    """Frames of three senders in any order; somewhere one of them aborts or dies, and the others go on sending."""
    rng = random.Random(seed)
    with make_pair(name, NO_PINGS, num_senders=3) as pair:
        grant = pair.grant(rng.sample(range(32), 12))
        blocks = [(layer_idx, slot) for layer_idx in range(LAYOUT.num_layers) for slot in range(12)]
        rng.shuffle(blocks)
        fault_at, culprit = rng.randrange(len(blocks)), rng.randrange(3)
        with make_raws(pair, grant) as raws:
            others = [raw for idx, raw in enumerate(raws) if idx != culprit]
            for idx, (layer_idx, slot) in enumerate(blocks):
                raw = rng.choice(raws if idx < fault_at else others)
                if idx == fault_at and seed % 2:
                    raws[culprit].close()
                elif idx == fault_at:
                    raws[culprit].send(Kind.ABORT, grant, b"sender gone")
                raw.send_bytes(raw.pack_blocks(grant, layer_idx, slot, [slot]))
            assert "gone" in pair.event()[2]
            pair.target.storage.fill_(7)
            for raw in others:
                kind, reason = raw.answer()
                assert kind == Kind.NACK
                assert b"gone" in reason
                raw.send_bytes(raw.pack_blocks(grant, *blocks[-1], [0]))
                raw.send(Kind.COMMIT, grant)
                assert raw.answer()[0] == Kind.NACK
            assert pair.is_silent()
            assert (pair.target.storage == 7).all()
