"""Peers that know the protocol and abuse it: it costs their own leases and nobody else's, and no thread ends."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from memory.frames import NONCE_BYTES, FrameSocket, Header, Kind, control
from memory.messages import LeaseGrant
from memory.peer import Peer
from tests.memory.kv_pair import CONFIG, FRAMED, NAMES, WAIT_S, Pair, RawSender, make_pair, make_raw, ship

pytestmark = pytest.mark.usefixtures("quiet")
DEEP = b'{"a":' * 20_000 + b"1" + b"}" * 20_000
LASTING = replace(CONFIG, lease_ttl_s=60.0)  # what is silent while another waits for its deadline lives on
BAD_GREETINGS = {
    "deep": DEEP,
    "digits": b'{"num_pages": 1' + b"0" * 5000 + b"}",
    "surrogate": b'{"layout": "\\ud800"}',
}
BAD_DETAILS = [
    ("shared_memory", {"num_pages": 10**30}),
    ("shared_memory", {"num_pages": -1}),
    ("shared_memory", {"segment": "longctx-1-\x00"}),
    ("tcp", {"codec": {"name": ["zstd"]}}),
    ("torch_distributed", {"meeting": ["127.0.0.1", 10**30, "name"]}),
    ("torch_distributed", {"meeting": ["\x00", 9, "name"]}),
    ("nixl", {"num_pages": 10**30}),
    ("nixl", {"agent": "AAAA"}),
    ("nixl", {"address": 10**30}),
]


def talk_on(connection: socket.socket, frame: bytes) -> None:
    """Send the frame without a pause until the connection ends."""
    with suppress(OSError):
        while True:
            connection.sendall(frame * 1000)


def is_alive(raw: RawSender, grant: LeaseGrant) -> bool:
    """Whether the lease is open on the connection."""
    raw.send(Kind.PING, grant)
    return raw.answer()[0] == Kind.PONG


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", BAD_GREETINGS)
def test_a_greeting_fails_its_own_lease(name: str, case: str) -> None:
    with make_pair(name, LASTING) as pair, make_raw(pair) as raw:
        kept = pair.grant([0], request_id="kept")
        raw.open(kept)
        raw.send(Kind.HELLO, pair.grant([1], request_id="hostile"), BAD_GREETINGS[case])
        assert raw.answer()[0] == Kind.NACK
        assert pair.event()[:2] == ("failed", "hostile")
        assert is_alive(raw, kept)


@pytest.mark.parametrize("name, details", [row for row in BAD_DETAILS if row[0] in NAMES])
def test_details_of_a_greeting(name: str, details: dict[str, Any]) -> None:
    """They fail the lease when it is opened, or with its first pages."""
    with make_pair(name, LASTING) as pair, make_raw(pair) as raw, make_raw(pair) as other:
        kept, hostile = pair.grant([0], request_id="kept"), pair.grant([1], request_id="hostile")
        other.open(kept)
        raw.send(Kind.HELLO, hostile, json.dumps({**raw.payloads.hello(), **details}).encode())
        kind, _ = raw.answer()
        assert kind in (Kind.NACK, Kind.PONG)
        if kind == Kind.PONG:
            raw.send_bytes(raw.pack_blocks(hostile, 0, 0, [1]))
        assert pair.event()[:2] == ("failed", "hostile")
        assert is_alive(other, kept)
        other.open(pair.grant([2], request_id="later"))


def test_a_lease_that_is_revoked_while_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sender is told that, not that others have its place."""
    with make_pair("tcp") as pair, make_raw(pair) as raw:
        grant = pair.grant([0])
        find = pair.receiver._leases.find

        def find_and_revoke(lease_id: int) -> Any:
            lease = find(lease_id)
            pair.receiver.revoke(grant.request_id)
            return lease

        monkeypatch.setattr(pair.receiver._leases, "find", find_and_revoke)
        raw.send(Kind.HELLO, grant, json.dumps(raw.payloads.hello()).encode())
        kind, reason = raw.answer()
        assert (kind, b"revoked" in reason) == (Kind.NACK, True)


def test_pages_of_a_refused_frame_take_no_memory() -> None:
    """A frame that is not served is read to its end, whatever it says."""
    with make_pair("torch_distributed") as pair, make_raw(pair) as raw:
        kept = pair.grant([0])
        raw.open(kept)
        raw.send(Kind.DATA, replace(kept, key=b"x" * 32), b"", num_pages=2**32 - 1)
        with suppress(ConnectionError):
            raw.answer()
        assert pair.event()[:2] == ("failed", "r")


@pytest.mark.parametrize("name", FRAMED)
def test_a_stranger_is_cut_off_however_busy_it_is(name: str) -> None:
    """One refused frame after another is not what keeps a connection, not even where the next is always there."""
    with make_pair(name, replace(CONFIG, connect_timeout_s=0.3)) as pair:
        host, _, port = pair.receiver.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as stranger:
            thread = threading.Thread(target=talk_on, args=[stranger, Header(Kind.PING).pack(b"x" * 32)])
            thread.start()
            deadline = time.monotonic() + CONFIG.send_timeout_s
            with suppress(ConnectionError):
                while stranger.recv(1 << 20):
                    assert time.monotonic() < deadline, "it is still served"
            thread.join(WAIT_S)


class HostileReceiver:
    """A listener that welcomes one sender, and sends it what a test wants."""

    def __init__(self, welcome: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        host, port = self._listener.getsockname()
        self.address = f"{host}:{port}"
        self.welcome = welcome
        self.connection: socket.socket | None = None

    def accept(self) -> socket.socket:
        """The sender, which has been welcomed."""
        self._listener.settimeout(WAIT_S)
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(WAIT_S)
        self.connection.sendall(self.welcome)
        return self.connection

    def close(self) -> None:
        """Close both sockets."""
        self._listener.close()
        if self.connection:
            self.connection.close()


WELCOME = b"".join(bytes(part) for part in control(Kind.WELCOME, 0, 0, bytes(NONCE_BYTES), key=b""))


@contextmanager
def make_hostile(pair: Pair, welcome: bytes = WELCOME) -> Iterator[tuple[HostileReceiver, LeaseGrant]]:
    """A receiver, and a lease that the pair's sender takes for one of its."""
    receiver = HostileReceiver(welcome)
    try:
        yield receiver, replace(pair.grant([0, 1]), address=receiver.address)
    finally:
        receiver.close()


@pytest.mark.parametrize("kind", [Kind.DATA, Kind.NACK, Kind.ACK])
def test_long_answers(kind: Kind) -> None:
    """A sender does not wait for the end of what no receiver says, in memory of its own."""
    with make_pair("tcp") as pair, make_hostile(pair) as (receiver, grant):
        pair.open(grant)
        connection = receiver.accept()
        connection.sendall(Header(kind, grant.lease_id, grant.epoch, payload_bytes=1 << 20).pack(b""))
        assert "a payload of 1048576 bytes" in pair.answer()[2]


@pytest.mark.parametrize("size", [0, NONCE_BYTES - 1, 1024])
def test_wrong_nonce(size: int) -> None:
    welcome = Header(Kind.WELCOME, payload_bytes=size).pack(b"") + bytes(size)
    with make_pair("tcp") as pair, make_hostile(pair, welcome) as (receiver, grant):
        pair.open(grant)
        receiver.accept()
        assert "nonce" in pair.answer()[2]


def test_a_receiver_that_talks_and_does_not_listen() -> None:
    """What it does not take times out, however much it says."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as sender:
        sender.connect(listener.getsockname())
        talker, _ = listener.accept()
        with talker:
            talker.sendall(b"more than is read")
            deadline = time.monotonic() + 0.3

            def listen() -> None:
                assert time.monotonic() < deadline + WAIT_S, "it sends forever"

            with pytest.raises(TimeoutError, match="took no data in time"):
                FrameSocket(sender).send([bytes(1 << 26)], deadline, on_readable=listen)


def test_a_sender_that_cannot_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file descriptor or thread is left for it: leases go on expiring, and the next sender is served."""
    with make_pair("tcp", replace(CONFIG, lease_ttl_s=1.0)) as pair:
        make_peer = pair.receiver._make_peer  # type: ignore[attr-defined]

        def fail(sock: socket.socket) -> Peer:
            monkeypatch.setattr(pair.receiver, "_make_peer", make_peer)
            raise OSError("Too many open files")

        monkeypatch.setattr(pair.receiver, "_make_peer", fail)
        ship(pair.open(pair.grant([0], request_id="first")), [1])
        assert pair.answer()[0] == "failed"
        assert pair.event()[:2] == ("failed", "first")
        ship(pair.open(pair.grant([0], request_id="second")), [1])
        assert pair.answer() == ("acked", "second")
