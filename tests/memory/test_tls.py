"""TLS between workers: what travels is not readable, strangers get nowhere, who says nothing holds nobody up."""

import socket
import ssl
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from memory.config import TransportConfig
from memory.tls import make_context
from tests.certificates import Certificate, make_certificate
from tests.memory.kv_pair import CONFIG, LAYOUT, Pair, make_pair, ship


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("ours"), "workers")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("strangers"), "workers")


def secured(made: Certificate, believed: Certificate | None = None) -> TransportConfig:
    """A configuration with its files."""
    return replace(CONFIG, tls_certificate=made.certificate, tls_key=made.key, tls_ca=(believed or made).certificate)


class Tap:
    """Stands between a sender and the receiver and keeps what passes."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.seen = bytearray()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        theirs, _ = self._listener.accept()
        ours = socket.create_connection(self._target)
        threading.Thread(target=self._pump, args=(ours, theirs), daemon=True).start()
        self._pump(theirs, ours)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(1 << 16):
            self.seen += data
            target.sendall(data)
        target.close()


@pytest.mark.parametrize("is_secured", [False, True])
def test_what_a_listener_on_the_wire_sees(ours: Certificate, is_secured: bool) -> None:
    with make_pair("tcp", secured(ours) if is_secured else CONFIG) as pair:
        pair.source.storage[:, 4] = 77
        grant = pair.grant([5, 3])
        tap = Tap(grant.address)
        ship(pair.open(replace(grant, address=tap.address)), [4, 9], payload=b"the first token")
        assert pair.answer() == ("acked", "r")
        assert pair.event() == ("commit", "r", "the first token")
        assert pair.arrived(([4, 9], [5, 3]))
        assert len(tap.seen) > 2 * LAYOUT.page_bytes
        for part in (bytes([77]) * 64, b"the first token", b"LCKV"):
            assert (part in tap.seen) != is_secured


def test_large_frames(ours: Certificate) -> None:
    layout = replace(LAYOUT, page_size=1 << 13)  # blocks of 2 MiB
    with make_pair("tcp", replace(secured(ours), frame_bytes="4MiB"), layout=layout, num_pages=8) as pair:
        stream = pair.open(pair.grant([2, 0, 5, 1]))
        for layer_idx in range(layout.num_layers):
            stream.send(layer_idx, range(4), [3, 4, 5, 6])
        stream.commit(b"")
        assert pair.answer() == ("acked", "r")
        assert pair.arrived(([3, 4, 5, 6], [2, 0, 5, 1]))


def test_revoked_while_it_is_sent(ours: Certificate) -> None:
    layout = replace(LAYOUT, page_size=1 << 13)
    with make_pair("tcp", secured(ours), layout=layout, num_pages=8) as pair:
        stream = pair.open(pair.grant(range(8)))
        for layer_idx in range(layout.num_layers):
            stream.send(layer_idx, range(8), range(8))
        time.sleep(0.005)
        pair.receiver.revoke("r")
        pair.target.storage.fill_(7)
        assert "revoked" in pair.answer()[2]
        assert (pair.target.storage == 7).all()


def test_strangers(ours: Certificate, strangers: Certificate) -> None:
    """Whoever the authority has not signed, on either side, and whoever speaks no TLS."""
    for theirs in (secured(strangers, ours), secured(ours, strangers), CONFIG):
        with make_pair("tcp", secured(ours)) as pair, make_pair("tcp", replace(theirs, connect_timeout_s=1.0)) as other:
            grant = pair.grant([0])
            ship(other.open(grant), [1])
            assert other.answer()[0] == "failed"
            assert pair.is_untouched()
            ship(pair.open(grant), [1])  # the lease is as it was
            assert pair.answer() == ("acked", "r")


def test_one_who_says_nothing(ours: Certificate) -> None:
    with make_pair("tcp", replace(secured(ours), connect_timeout_s=0.3)) as pair:
        host, _, port = pair.receiver.address.rpartition(":")
        silent = socket.create_connection((host, int(port)))
        silent.settimeout(5)
        ship(pair.open(pair.grant([0])), [1])
        assert pair.answer() == ("acked", "r")
        assert silent.recv(1) == b""


def test_files(ours: Certificate, strangers: Certificate, tmp_path: Path) -> None:
    good = secured(ours)
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    for change, message in (
        ({"tls_ca": str(tmp_path / "none")}, "tls_ca=.*cannot be read"),
        ({"tls_ca": None}, "tls_ca is missing: .*all or none"),
        ({"name": "nixl"}, "transport.name=nixl.*tcp or auto"),
        ({"tls_ca": str(junk)}, "tls_ca=.*certificates as PEM"),
        ({"tls_key": strangers.key}, "tls_key=.*belongs to it"),
    ):
        with pytest.raises(ValueError, match=message):
            make_context(replace(good, **change), server_side=True)
    assert make_context(CONFIG, server_side=True) is None


def test_version(ours: Certificate) -> None:
    """Nothing older than TLS 1.3, nobody without a certificate."""

    def ask(pair: Pair, version: ssl.TLSVersion, *, with_certificate: bool) -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.maximum_version = False, version
        context.load_verify_locations(cafile=ours.certificate)
        if with_certificate:
            context.load_cert_chain(ours.certificate, ours.key)
        host, _, port = pair.receiver.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as sock, context.wrap_socket(sock) as secure:
            return secure.recv(4)

    with make_pair("tcp", secured(ours)) as pair:
        assert ask(pair, ssl.TLSVersion.TLSv1_3, with_certificate=True) == b"LCKV"
        with pytest.raises(ssl.SSLError, match="certificate required"):
            ask(pair, ssl.TLSVersion.TLSv1_3, with_certificate=False)
        with pytest.raises(ssl.SSLError, match="protocol version"):
            ask(pair, ssl.TLSVersion.TLSv1_2, with_certificate=True)
