"""Every transport: several senders fill one lease, each its own pages, and all of them hear of the commit at once.

Pings are slower than any wait here unless a test says otherwise: what a sender hears, it hears unasked.
"""

import random
from dataclasses import replace

import pytest
import torch

from memory import link
from memory.frames import Kind
from memory.stream import Order, Stream
from tests.memory.kv_pair import CONFIG, FRAMED, LAYOUT, WAIT_S, RawSender, make_pair, make_raw, make_raws

NO_PINGS = replace(CONFIG, lease_ttl_s=100 * WAIT_S, send_timeout_s=100 * WAIT_S)
SHARES = {
    "contiguous": ([0, 1, 2], [3, 4, 5], [6, 7, 8]),
    "striped": ([0, 3, 6], [1, 4, 7], [2, 5, 8]),
    "uneven": ([0, 1, 2, 3, 5, 6, 8], [4, 7], []),
}
SOURCE_PAGES = ([9, 1, 2, 4, 3, 31, 30, 11, 12], [0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1, 0])
TARGET_PAGES = [5, 6, 7, 20, 3, 2, 1, 30, 31]


@pytest.mark.parametrize("name", FRAMED)
@pytest.mark.parametrize("frame_bytes", ["1KiB", "1MiB"])
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("payload_of", [None, 0, 2])
def test_round_trip(name: str, frame_bytes: str, shares: str, payload_of: int | None) -> None:
    """Layer by layer, all senders in turn; none of them pings before it is acknowledged."""
    with make_pair(name, replace(NO_PINGS, frame_bytes=frame_bytes), num_senders=3) as pair:
        streams = pair.open_all(pair.grant(TARGET_PAGES))
        pages_of = [pages[: len(share)] for pages, share in zip(SOURCE_PAGES, SHARES[shares], strict=True)]
        for layer_idx in range(LAYOUT.num_layers):
            for stream, share, pages in zip(streams, SHARES[shares], pages_of, strict=True):
                stream.send(layer_idx, share, pages)
        for sender_idx, stream in enumerate(streams):
            stream.commit(b"first tokens" if sender_idx == payload_of else b"")
        assert [pair.answer(sender_idx) for sender_idx in range(3)] == [("acked", "r")] * 3
        assert pair.event() == ("commit", "r", "" if payload_of is None else "first tokens")
        targets_of = [[TARGET_PAGES[page_idx] for page_idx in share] for share in SHARES[shares]]
        assert pair.arrived(*zip(pages_of, targets_of, strict=True))
        assert [s.bytes_shipped for s in pair.senders] == [len(pages) * LAYOUT.page_bytes for pages in pages_of]
        assert pair.receiver.bytes_received == 9 * LAYOUT.page_bytes
        assert pair.receiver.num_leases == 0
        assert pair.is_silent()


@pytest.mark.parametrize("name", FRAMED)
def test_an_early_commit_is_acked_with_the_last(name: str) -> None:
    with make_pair(name, NO_PINGS, num_senders=3) as pair:
        grant = pair.grant([4, 5, 6])
        with make_raws(pair, grant) as raws:
            for sender_idx, raw in enumerate(raws):
                for layer_idx in range(LAYOUT.num_layers):
                    raw.send_bytes(raw.pack_blocks(grant, layer_idx, sender_idx, [sender_idx]))
            raws[1].send(Kind.COMMIT, grant, b"tokens")
            raws[0].send(Kind.COMMIT, grant)
            assert raws[0].is_silent()
            assert raws[1].is_silent()
            assert pair.is_silent(0)
            raws[1].send(Kind.PING, grant)  # it is answered while it waits
            assert raws[1].answer() == (Kind.PONG, b"")
            raws[2].send(Kind.COMMIT, grant)
            assert [raw.answer() for raw in raws] == [(Kind.ACK, b"")] * 3
            assert pair.event() == ("commit", "r", "tokens")
            assert pair.arrived(([0], [4]), ([1], [5]), ([2], [6]))
            assert all(raw.is_silent(0.02) for raw in raws)


@pytest.mark.parametrize("name", FRAMED)
def test_a_ping_crosses_the_commit(name: str) -> None:
    """It comes while the receiver's callback runs, when the lease is no longer open and not yet acknowledged."""
    with make_pair(name, NO_PINGS, num_senders=2) as pair:
        grant = pair.grant([])
        with make_raws(pair, grant) as (early, last):
            early.send(Kind.COMMIT, grant)
            assert early.is_silent()
            pair.gate.clear()
            last.send(Kind.COMMIT, grant)
            assert pair.event() == ("commit", "r", "")
            early.send(Kind.PING, grant)
            assert early.is_silent()
            pair.gate.set()
            assert early.answer() == (Kind.ACK, b"")
            assert last.answer() == (Kind.ACK, b"")
            assert early.is_silent()
            early.send(Kind.PING, grant)  # this one crossed nothing
            kind, reason = early.answer()
            assert kind == Kind.NACK
            assert b"committed" in reason


@pytest.mark.parametrize("name", FRAMED)
def test_pings_cross_commits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many short leases under a storm of pings."""
    monkeypatch.setattr(link, "_PINGS", 2000)
    with make_pair(name, num_senders=3) as pair:
        for round_idx in range(40):
            streams = pair.open_all(pair.grant([0, 1, 2], request_id=str(round_idx)))
            for sender_idx, stream in enumerate(streams):
                for layer_idx in range(LAYOUT.num_layers):
                    stream.send(layer_idx, [sender_idx], [round_idx % 32])
                stream.commit(b"")
            assert [pair.answer(sender_idx) for sender_idx in range(3)] == [("acked", str(round_idx))] * 3
            assert pair.event() == ("commit", str(round_idx), "")


@pytest.mark.parametrize("name", FRAMED)
def test_a_fourth_sender_is_refused(name: str) -> None:
    """The lease goes on without it."""
    with make_pair(name, NO_PINGS, num_senders=3) as pair:
        grant = pair.grant([4])
        with make_raws(pair, grant) as raws, make_raw(pair) as fourth:
            fourth.send(Kind.HELLO, grant, b"{}")
            kind, reason = fourth.answer()
            assert kind == Kind.NACK
            assert b"as many connections as it may be" in reason
            fourth.send_bytes(fourth.pack_blocks(grant, 0, 0, [1]))
            assert b"not open on this connection" in fourth.answer()[1]
            fourth.close()
            assert pair.is_untouched()
            for layer_idx in range(LAYOUT.num_layers):
                raws[layer_idx].send_bytes(raws[layer_idx].pack_blocks(grant, layer_idx, 0, [layer_idx]))
                raws[layer_idx].send(Kind.COMMIT, grant)
            assert [raw.answer()[0] for raw in raws] == [Kind.ACK] * 3
            for layer_idx in range(LAYOUT.num_layers):
                assert torch.equal(
                    pair.target.storage[layer_idx, 4], pair.sources[layer_idx].storage[layer_idx, layer_idx]
                )


def test_pages_become_few_orders() -> None:
    """What is not in the grant is skipped, neighbours in the grant stay together."""
    with make_pair("tcp") as pair:
        grant = pair.grant([10, 11, 12, 13, 14, 15], page_idxs=[2, 3, 5, 9, 10, 12])
        stream = Stream(grant, pair.source, on_acked=lambda: None, on_failed=print)
        orders: list[Order] = []
        stream.put = lambda order: orders.append(order) is None

        def send(page_idxs, pages) -> list[tuple[int, tuple[int, ...]]]:
            orders.clear()
            stream.send(1, page_idxs, pages)
            assert all(order.kind == Kind.DATA and order.layer_idx == 1 for order in orders)
            return [(order.first_slot, order.pages) for order in orders]

        assert send(range(13), range(13)) == [(0, (2, 3, 5, 9, 10, 12))]
        assert send(range(0, 13, 3), [4, 5, 6, 7, 8]) == [(1, (5,)), (3, (7,)), (5, (8,))]
        assert send([9, 10, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]) == [(3, (1, 2)), (0, (3, 4, 6))]
        assert send([0, 1, 4, 6, 7, 8, 11], range(7)) == []
        assert send([], []) == []
        with pytest.raises(ValueError, match="page 13 of the sequence is not in the grant, which ends at 13"):
            send([12, 13], [0, 1])
        assert orders == []


@pytest.mark.parametrize("name", FRAMED)
def test_two_receivers_with_two_senders_each(name: str) -> None:
    """Ranks of a decode worker hold a part of the sequence each; every rank of the prefill worker sends to both."""
    with make_pair(name, NO_PINGS, num_senders=2) as low, make_pair(name, NO_PINGS, num_senders=2) as high:
        grants = [low.grant([7, 3, 9]), high.grant([1, 0, 5], page_idxs=[3, 5, 7])]
        for sender_idx in range(2):
            for pair, grant in zip((low, high), grants, strict=True):
                stream = low.senders[sender_idx].open(
                    grant,
                    on_acked=lambda pair=pair, idx=sender_idx: pair.answers_of[idx].put(("acked",)),
                    on_failed=print,
                )
                page_idxs = range(sender_idx, grant.page_idxs[-1] + 1, 2)  # lies in page 20 + page_idx
                for layer_idx in range(LAYOUT.num_layers):
                    stream.send(layer_idx, page_idxs, [20 + page_idx for page_idx in page_idxs])
                stream.commit(b"")
        for pair in (low, high):
            assert [pair.answer(sender_idx) for sender_idx in range(2)] == [("acked",)] * 2
        assert low.arrived(([20, 22], [7, 9]), ([21], [3]))
        high.sources = low.sources
        assert high.arrived(([], []), ([23, 25, 27], [1, 0, 5]))


@pytest.mark.parametrize("name", FRAMED)
@pytest.mark.parametrize("seed", range(4))
def test_random_interleaving(name: str, seed: int) -> None:
    """Frames of any size in any order, cut anywhere, pings in between."""
    rng = random.Random(seed)
    num_senders, num_pages = rng.randint(2, 5), 24
    with make_pair(name, NO_PINGS, num_senders=num_senders) as pair:
        target_pages = rng.sample(range(32), num_pages)
        grant = pair.grant(target_pages)
        with make_raws(pair, grant) as raws:
            bytes_of, expected = random_frames(rng, raws, pair, grant)
            while any(bytes_of):
                idx = rng.choice([idx for idx, data in enumerate(bytes_of) if data])
                cut = rng.randint(1, 1 << 16)
                raws[idx].send_bytes(bytes_of[idx][:cut])
                bytes_of[idx] = bytes_of[idx][cut:]
            for raw in raws:
                kinds = []
                while not kinds or kinds[-1] == Kind.PONG:
                    kinds.append(raw.answer()[0])
                assert kinds == [Kind.PONG] * 4 + [Kind.ACK]
            assert pair.event() == ("commit", "r", "payload")
            assert torch.equal(pair.target.storage, expected)


def random_frames(rng: random.Random, raws: list[RawSender], pair, grant) -> tuple[list[bytes], torch.Tensor]:
    """What each sender sends, four pings and the commit included, and what the target's storage must be afterwards."""
    expected = torch.zeros_like(pair.target.storage)
    frames_of: list[list[bytes]] = [[raw.pack(Kind.PING, grant)] * 4 for raw in raws]
    for layer_idx in range(LAYOUT.num_layers):
        slot = 0
        while slot < len(grant.pages):
            count = min(rng.randint(1, 6), len(grant.pages) - slot)
            sender_idx, pages = rng.randrange(len(raws)), rng.sample(range(32), count)
            frames_of[sender_idx].append(raws[sender_idx].pack_blocks(grant, layer_idx, slot, pages))
            expected[layer_idx, list(grant.pages[slot : slot + count])] = pair.sources[sender_idx].storage[
                layer_idx, pages
            ]
            slot += count
    payload_of = rng.randrange(len(raws))
    for sender_idx, (raw, frames) in enumerate(zip(raws, frames_of, strict=True)):
        rng.shuffle(frames)
        payload = b"payload" if sender_idx == payload_of else b""
        frames.append(raw.pack(Kind.COMMIT, grant, payload) + payload)
    return [b"".join(frames) for frames in frames_of], expected
