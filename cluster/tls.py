"""TLS of the endpoint: what it serves with, and what the commands of its own machine know it by.

Whoever listens speaks it: our own listener (`cluster/listener.py`), or Ray Serve's proxy (`cluster/serve_app.py`).
Certificates are read at the start; a new one needs a restart. Left out: certificates of clients.
"""

import os
import ssl
from pathlib import Path

from cluster.config import ServerConfig
from longctx.errors import ConfigError

BEGIN, END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def check_tls(server: ServerConfig) -> None:
    """Raises ``ConfigError`` if the files are not a certificate and its key."""
    if server.tls_certificate is not None or server.tls_key is not None:
        server_context(server)


def server_context(server: ServerConfig) -> ssl.SSLContext:
    """What the listener speaks TLS with; raises ``ConfigError``."""
    certificate, key = server.tls_certificate, server.tls_key
    if certificate is None or key is None:
        missing = "tls_key" if key is None else "tls_certificate"
        raise ConfigError(f"server.{missing}=null is not allowed: a certificate and its key belong together")
    named = f"server.tls_certificate={certificate!r} server.tls_key={key!r}"
    for path in (certificate, key):
        try:
            Path(path).expanduser().read_bytes()
        except OSError as error:
            raise ConfigError(f"{named} cannot be read: {error}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # The passphrase is one that no key has: without any, OpenSSL would ask the terminal for it.
        context.load_cert_chain(Path(certificate).expanduser(), Path(key).expanduser(), password="\0")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"{named} is not allowed: a certificate and the key that belongs to it, without a passphrase, as PEM "
            f"({error})"
        ) from None
    return context


def client_context(server: ServerConfig) -> ssl.SSLContext | bool:
    """What a command verifies the endpoint with, as httpx takes it; raises ``ConfigError``.

    With ``server.tls_ca`` as any client does. Without, the endpoint must have ``server.tls_certificate`` itself,
    whatever name is in it: the commands of its own machine ask 127.0.0.1.
    """
    key, path = ("tls_ca", server.tls_ca) if server.tls_ca is not None else ("tls_certificate", server.tls_certificate)
    if path is None:
        return True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    path = os.path.expanduser(path)
    try:
        if key == "tls_ca":
            context.load_verify_locations(cafile=path)
            return context
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate need not be a CA's
        context.load_verify_locations(cadata=_first_certificate(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"server.{key}={path!r} is not allowed: a PEM file of certificates ({error})") from None
    return context


def _first_certificate(text: str) -> str:
    """The endpoint's own certificate, which comes first: the others of its chain can sign more."""
    start, end = text.find(BEGIN), text.find(END)
    if not 0 <= start < end:
        raise ValueError(f"no {BEGIN}")
    return text[start : end + len(END)] + "\n"
