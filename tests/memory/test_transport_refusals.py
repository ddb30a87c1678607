"""Frames that are wrong, stale, replayed, forged or corrupt are refused, and write nothing."""

import json
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from memory.frames import HEADER_BYTES, Header, Kind, checksum, is_signed
from memory.layout import KVLayout
from memory.messages import LeaseGrant
from memory.transport import TRANSPORTS
from tests.memory.kv_pair import CONFIG, FRAMED, LAYOUT, WAIT_S, Pair, RawSender, make_pair, make_raw, ship


def hello(raw: RawSender, grant: LeaseGrant, **details: Any) -> tuple[int, bytes]:
    """Open the grant as a right sender does but for ``details``; the answer."""
    raw.send(Kind.HELLO, grant, json.dumps({**raw.payloads.hello(), **details}).encode())
    return raw.answer()


def send_data(raw: RawSender, grant: LeaseGrant, **fields: int) -> tuple[int, bytes]:
    """A right DATA frame but for ``fields`` of its header; the answer to it or to the PING after it."""
    payload, right = raw.data(0, 0, [4, 5])
    raw.send(Kind.DATA, grant, payload, **{**right, **fields})
    raw.send(Kind.PING, grant)
    return raw.answer()


NOT_THE_LEASES = {
    "key": (lambda grant: replace(grant, key=b"x" * 32), "not signed"),
    "epoch": (lambda grant: replace(grant, epoch=grant.epoch - 1), "epoch"),
    "lease": (lambda grant: replace(grant, lease_id=grant.lease_id + 1), "never granted"),
}


@pytest.mark.parametrize("name", FRAMED)
@pytest.mark.parametrize("case", NOT_THE_LEASES)
def test_grant_that_is_not_the_receivers(name: str, case: str) -> None:
    """A whole stream on a wrong grant fails at the sender; the right one still works afterwards."""
    change, message = NOT_THE_LEASES[case]
    with make_pair(name) as pair:
        grant = pair.grant([0, 1])
        ship(pair.open(change(grant)), [4, 5])
        kind, _, reason = pair.answer()
        assert kind == "failed"
        assert message in reason
        assert pair.is_silent()
        assert pair.is_untouched()
        ship(pair.open(grant), [4, 5])
        assert pair.answer() == ("acked", "r")
        assert pair.arrived(([4, 5], [0, 1]))


@pytest.mark.parametrize("name", FRAMED)
@pytest.mark.parametrize("case", NOT_THE_LEASES)
def test_frame_that_is_not_the_leases(name: str, case: str) -> None:
    """One wrong frame in a right conversation changes nothing."""
    change, message = NOT_THE_LEASES[case]
    with make_pair(name) as pair, make_raw(pair) as raw:
        grant = pair.grant([0, 1])
        assert hello(raw, grant)[0] == Kind.PONG
        kind, reason = send_data(raw, change(grant))
        assert kind == Kind.NACK
        assert message in reason.decode()
        assert raw.answer()[0] == Kind.NACK  # to the ping
        assert pair.is_untouched()
        assert pair.is_silent()
        assert send_data(raw, grant)[0] == Kind.PONG
        assert pair.receiver.bytes_received == 2 * LAYOUT.block_bytes


WRONG_FIELDS = {
    "past the lease": ({"first_slot": 1}, "not in the lease"),
    "far past the lease": ({"first_slot": 2**32 - 1}, "not in the lease"),
    "no pages": ({"num_pages": 0}, "not in the lease"),
    "layer": ({"layer_idx": 3}, "layer 3"),
    "too few bytes": ({"num_pages": 1}, "bytes for 1 pages"),
}


@pytest.mark.parametrize("name", FRAMED)
@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_frame_outside_its_lease(name: str, case: str) -> None:
    """The sender has the key but asks for too much: nothing is written and the lease fails on both sides."""
    fields, message = WRONG_FIELDS[case]
    with make_pair(name) as pair, make_raw(pair) as raw:
        grant = pair.grant([0, 1])
        hello(raw, grant)
        kind, reason = send_data(raw, grant, **fields)
        assert kind == Kind.NACK
        assert message in reason.decode()
        assert pair.event()[:2] == ("failed", "r")
        assert pair.is_untouched()
        assert pair.receiver.num_leases == 0


@pytest.mark.parametrize("name", FRAMED)
def test_frame_without_hello(name: str) -> None:
    with make_pair(name) as pair, make_raw(pair) as raw:
        kind, reason = send_data(raw, pair.grant([0, 1]))
        assert kind == Kind.NACK
        assert b"not open" in reason
        assert pair.is_untouched()
        assert pair.is_silent()


@pytest.mark.parametrize("name", FRAMED)
def test_wrong_layout(name: str) -> None:
    """``open`` compares layouts; a sender that lies about the grant's is found by HELLO."""
    other = KVLayout(3, 2, 32, 8, "float32", "hnd")
    with make_pair(name) as pair:
        sender = TRANSPORTS.get(name).make_sender(TRANSPORTS.get(name).allocate(other, 4), CONFIG)
        grant = pair.grant([0])
        with pytest.raises(ValueError, match="layout"):
            sender.open(grant, on_acked=print, on_failed=print)
        stream = sender.open(
            replace(grant, layout=other),
            on_acked=print,
            on_failed=lambda reason: pair.answers.put(("failed", reason)),
        )
        ship(stream, [1])
        assert "layout" in pair.answer()[1]
        assert "layout" in pair.event()[2]
        assert pair.is_untouched()
        sender.close()


@pytest.mark.parametrize("name", FRAMED)
def test_pages_are_written_once(name: str) -> None:
    with make_pair(name) as pair, make_raw(pair) as raw:
        grant = pair.grant([0, 1])
        hello(raw, grant)
        assert send_data(raw, grant)[0] == Kind.PONG
        pair.source.storage.add_(1)
        assert b"sent before" in send_data(raw, grant)[1]
        pair.source.storage.sub_(1)
        assert (pair.target.storage[0, :2] == pair.source.storage[0, 4:6]).all()


@pytest.mark.parametrize("name", FRAMED)
def test_replay(name: str) -> None:
    """The very bytes of a frame, sent again after the commit and on another connection."""
    with make_pair(name) as pair, make_raw(pair) as raw, make_raw(pair) as thief:
        grant = pair.grant([0])
        greeting = json.dumps(raw.payloads.hello()).encode()
        greeting = raw.pack(Kind.HELLO, grant, greeting) + greeting
        thief.send_bytes(greeting)  # recorded from a connection with another nonce
        assert b"not signed" in thief.answer()[1]
        raw.send_bytes(greeting)
        assert raw.answer()[0] == Kind.PONG
        frames = []
        for layer_idx in range(LAYOUT.num_layers):
            payload, fields = raw.data(layer_idx, 0, [9])
            frames.append(raw.pack(Kind.DATA, grant, payload, **fields) + payload)
        thief.send_bytes(frames[0])
        assert b"not open on this connection" in thief.answer()[1]
        assert pair.is_untouched()
        for frame in frames:
            raw.send_bytes(frame)
        commit = raw.pack(Kind.COMMIT, grant)
        raw.send_bytes(commit)
        assert raw.answer()[0] == Kind.ACK
        assert pair.event()[0] == "commit"
        pair.target.storage.zero_()
        for frame in (*frames, commit, greeting):
            raw.send_bytes(frame)
            assert b"committed" in raw.answer()[1]
        assert pair.is_untouched()
        assert pair.is_silent()


def spoil_tcp(payload: bytes) -> bytes:
    """One bit of the blocks."""
    return payload[:-1] + bytes([payload[-1] ^ 1])


def spoil_shared_memory(payload: bytes) -> bytes:
    """One bit of the blocks' checksum, as if the sender had reused the pages."""
    return bytes([payload[0] ^ 1]) + payload[1:]


SPOIL: dict[str, Callable[[bytes], bytes]] = {"tcp": spoil_tcp, "shared_memory": spoil_shared_memory}


@pytest.mark.parametrize(
    ("name", "is_checksum_right"), [("tcp", False), ("shared_memory", False), ("shared_memory", True)]
)
def test_corrupt_payload(name: str, is_checksum_right: bool) -> None:
    """Corrupt in flight; for shared memory also a descriptor that arrives intact but does not fit the pages."""
    with make_pair(name) as pair, make_raw(pair) as raw:
        grant = pair.grant([0, 1])
        hello(raw, grant)
        payload, fields = raw.data(0, 0, [4, 5])
        spoilt = SPOIL[name](payload)
        fields["checksum"] = checksum([spoilt if is_checksum_right else payload])
        raw.send(Kind.DATA, grant, spoilt, **fields)
        kind, reason = raw.answer()
        assert kind == Kind.NACK
        assert b"checksum" in reason
        assert "checksum" in pair.event()[2]
        assert pair.receiver.bytes_received == 0
        raw.send(Kind.COMMIT, grant)
        assert raw.answer()[0] == Kind.NACK
        assert pair.is_silent()


@pytest.mark.parametrize("name", FRAMED)
def test_page_reused_before_it_was_shipped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_pair(name) as pair:
        make_payloads = pair.sender._make_payloads

        def make_racing_payloads() -> Any:
            payloads = make_payloads()
            data = payloads.data

            def reuse(grant: Any, layer_idx: int, pages: Any, ready: Any) -> Any:
                frame = data(grant, layer_idx, pages, ready)
                pair.source.storage[layer_idx, pages[0], 17] += 1
                return frame

            monkeypatch.setattr(payloads, "data", reuse)
            return payloads

        monkeypatch.setattr(pair.sender, "_make_payloads", make_racing_payloads)
        ship(pair.open(pair.grant([0, 1])), [4, 5])
        assert "checksum" in pair.answer()[2]
        assert "checksum" in pair.event()[2]


def segment_cases(pair: Pair) -> dict[str, tuple[dict[str, Any], bytes]]:
    """What HELLO may not say of a segment."""
    return {
        "path": ({"segment": "../etc/passwd"}, b"not the name"),
        "gone": ({"segment": "longctx-1-0123456789abcdef"}, b"No such file"),
        "size": ({"num_pages": pair.source.num_pages + 1}, b"has"),
        "type": ({"num_pages": "32"}, b"how many pages"),
    }


@pytest.mark.parametrize("case", ["path", "gone", "size", "type"])
def test_wrong_segment(case: str) -> None:
    with make_pair("shared_memory") as pair, make_raw(pair) as raw:
        details, message = segment_cases(pair)[case]
        kind, reason = hello(raw, pair.grant([0]), **details)
        assert kind == Kind.NACK
        assert message in reason
        assert pair.event()[0] == "failed"


def test_page_outside_the_segment() -> None:
    with make_pair("shared_memory") as pair, make_raw(pair) as raw:
        grant = pair.grant([0, 1])
        hello(raw, grant)
        payload, fields = raw.data(0, 0, [4, 5])
        payload = payload[:-4] + (32).to_bytes(4, "little")
        raw.send(Kind.DATA, grant, payload, **{**fields, "checksum": checksum([payload])})
        assert b"page 32 is not in the sender's pool" in raw.answer()[1]
        assert pair.is_untouched()


def test_hello_that_is_no_object() -> None:
    with make_pair("tcp") as pair, make_raw(pair) as raw:
        for idx, payload in enumerate((b"{", b"[]", b"\xff")):
            raw.send(Kind.HELLO, pair.grant([0], request_id=str(idx)), payload)
            assert raw.answer()[0] == Kind.NACK


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n" * 8, Header(Kind.COMMIT, payload_bytes=1 << 40).pack(b"k"), b""]
)
def test_strangers_are_cut_off(data: bytes) -> None:
    """Other protocols, absurd lengths, silence."""
    with make_pair("tcp", replace(CONFIG, connect_timeout_s=0.3)) as pair:
        host, _, port = pair.receiver.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as stranger:
            stranger.sendall(data)
            assert Header.unpack(stranger.recv(4096)).kind == Kind.WELCOME
            with suppress(ConnectionResetError):  # it had unread data
                assert stranger.recv(4096) == b""
        ship(pair.open(pair.grant([0])), [1])
        assert pair.answer() == ("acked", "r")


def test_header() -> None:
    header = Header(Kind.DATA, 2**63, 2**32 - 1, 7, 8, 9, 10, 2**64 - 1)
    raw = header.pack(b"key")
    assert len(raw) == HEADER_BYTES
    assert Header.unpack(raw) == header
    assert is_signed(raw, b"key")
    assert not is_signed(raw, b"other")
    for idx in range(HEADER_BYTES):
        forged = raw[:idx] + bytes([raw[idx] ^ 1]) + raw[idx + 1 :]
        assert not is_signed(forged, b"key")
