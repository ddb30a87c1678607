"""TLS between workers: both ends show a certificate, and both must be signed by ``transport.tls_ca``.

Names in certificates are not looked at: workers are known by the authority that signed them, one certificate may serve
all. A lease's key still says who may write what; TLS keeps others from reading along and from altering what they see.
"""

import select
import socket
import ssl
import time
from pathlib import Path

from memory.config import TLS_FILES, TransportConfig
from memory.frames import Cursor, FrameSocket, Waker


def make_context(config: TransportConfig, *, server_side: bool) -> ssl.SSLContext | None:
    """What ``config``'s files make; None without. Raises ``ValueError`` that says what is wrong and what is allowed."""
    given = {name: getattr(config, name) for name in TLS_FILES if getattr(config, name) is not None}
    if not given:
        return None
    if missing := [name for name in TLS_FILES if not given.get(name)]:
        raise ValueError(f"transport.{missing[0]} is missing: {', '.join(TLS_FILES)} belong together, all or none")
    if config.name not in ("auto", "tcp"):
        raise ValueError(
            f"transport.tls_certificate is not allowed with transport.name={config.name}, which would send KV beside "
            "TLS: tcp or auto"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    certificate, key, authority = (Path(given[name]).expanduser() for name in TLS_FILES)
    for name, path in (("certificate", certificate), ("key", key), ("ca", authority)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ValueError(f"transport.tls_{name}={str(path)!r} cannot be read on this node: {error}") from None
    try:
        # The passphrase is one that no key has: without any, OpenSSL would ask the terminal for it.
        context.load_cert_chain(certificate, key, password="\0")
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(
            f"transport.tls_certificate={str(certificate)!r} transport.tls_key={str(key)!r} is not allowed: a "
            f"certificate and the key that belongs to it, without a passphrase, as PEM ({error})"
        ) from None
    try:
        context.load_verify_locations(cafile=authority)
    except ssl.SSLError as error:
        raise ValueError(f"transport.tls_ca={str(authority)!r} is not allowed: certificates as PEM ({error})") from None
    return context


class TlsSocket(FrameSocket):
    """A frame socket under TLS once ``secure`` has returned; nothing may be sent or read before."""

    def __init__(self, sock: socket.socket, waker: Waker | None, *, context: ssl.SSLContext, server_side: bool) -> None:
        super().__init__(sock, waker)
        self._context, self._server_side = context, server_side
        self._tls: ssl.SSLSocket | None = None

    def secure(self, deadline: float) -> None:
        self._socket = self._tls = self._context.wrap_socket(
            self._socket, server_side=self._server_side, do_handshake_on_connect=False
        )
        while True:
            try:
                self._tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except ssl.SSLError as error:
                raise ConnectionError(f"TLS: {error.reason or error}") from None
            if not self.wait(events, deadline) and time.monotonic() >= deadline:
                raise TimeoutError("no TLS handshake in time")

    def wait(self, events: int, deadline: float) -> int:
        if events & select.POLLIN and self._tls is not None and self._tls.pending():
            return select.POLLIN  # read from the network already
        return super().wait(events, deadline)

    def receive_some(self, cursor: Cursor) -> int:
        assert self._tls is not None
        try:
            num_bytes = self._tls.recv_into(cursor.buffers[0])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except ssl.SSLError as error:
            raise ConnectionError(f"TLS: {error.reason or error}") from None
        if not num_bytes:
            raise ConnectionError("the peer closed the connection")
        cursor.advance(num_bytes)
        return num_bytes

    def shutdown(self) -> None:
        try:
            # Not the TLS socket's own method, which would let a send of the owning thread go out in plain text.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        except OSError:
            return

    def _send_some(self, cursor: Cursor) -> int:
        assert self._tls is not None
        try:
            return self._tls.send(cursor.buffers[0])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except ssl.SSLError as error:
            raise ConnectionError(f"TLS: {error.reason or error}") from None
