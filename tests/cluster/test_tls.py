"""HTTPS: what the listener serves, who is believed, and what is refused before anything starts."""

import asyncio
import ssl

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from cluster.config import ServerConfig
from cluster.listener import Listener
from cluster.tls import check_tls, client_context
from longctx.errors import ConfigError
from tests.certificates import Certificate, make_certificate
from tests.cli_server import free_port

HERE = "127.0.0.1"


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("ours"), HERE)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Certificate:
    """For another name."""
    return make_certificate(tmp_path_factory.mktemp("elsewhere"), "model.example.org")


def config(made: Certificate, **options) -> ServerConfig:
    return ServerConfig(tls_certificate=made.certificate, tls_key=made.key, port=free_port(), **options)


def ask(server: ServerConfig, verify: ssl.SSLContext | bool, *, scheme: str = "https") -> str:
    """What a client gets of a listener with this configuration."""

    async def answer(_) -> PlainTextResponse:
        return PlainTextResponse("here")

    async def run() -> str:
        listener = Listener(Starlette(routes=[Route("/", answer)]), server, grace_s=0.2)
        await listener.start()
        try:
            async with httpx.AsyncClient(verify=verify, trust_env=False) as client:
                return (await client.get(f"{scheme}://{HERE}:{server.port}/", timeout=10)).text
        finally:
            await listener.stop()

    return asyncio.run(run())


def test_a_ca_is_believed(ours):
    server = config(ours, tls_ca=ours.certificate)
    assert ask(server, client_context(server)) == "here"


def test_the_certificate_itself_is_believed_whatever_its_name(ours, elsewhere):
    for made in (ours, elsewhere):
        server = config(made)
        assert ask(server, client_context(server)) == "here"


def test_a_ca_is_asked_for_the_name(elsewhere):
    server = config(elsewhere, tls_ca=elsewhere.certificate)
    with pytest.raises(httpx.ConnectError, match=r"(?i)mismatch|not valid for"):
        ask(server, client_context(server))


def test_others_are_not_believed(ours, elsewhere):
    for verify in (True, client_context(config(elsewhere)), client_context(ServerConfig(tls_ca=elsewhere.certificate))):
        with pytest.raises(httpx.ConnectError, match=r"(?i)certificate verify failed"):
            ask(config(ours), verify)


def test_old_versions_are_not_spoken(ours):
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(httpx.TransportError):
        ask(config(ours), old)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert ask(config(ours), old) == "here"


def test_http_is_not_answered_there(ours):
    with pytest.raises(httpx.TransportError):
        ask(config(ours), True, scheme="http")


def test_without_a_certificate_it_is_http():
    server = ServerConfig(port=free_port())
    assert client_context(server) is True
    assert ask(server, True, scheme="http") == "here"


def test_an_application_of_serve_leaves_it_to_serve(ours):
    from cluster.service import build as build_application

    with pytest.raises(ConfigError, match="ssl_certfile and ssl_keyfile"):
        build_application({"overrides": list(ours.overrides)})


def test_files_that_are_no_certificate_and_key_are_named(ours, elsewhere, tmp_path):
    locked = make_certificate(tmp_path / "locked", HERE, passphrase="open sesame")
    text = tmp_path / "text"
    text.write_text("no PEM")
    for certificate, key, words in (
        (ours.certificate, None, "server.tls_key=null is not allowed"),
        (None, ours.key, "server.tls_certificate=null is not allowed"),
        (ours.certificate, "/absent", "server.tls_key='/absent' cannot be read"),
        ("/absent", ours.key, "server.tls_certificate='/absent' server.tls_key="),
        (ours.certificate, elsewhere.key, "the key that belongs to it"),
        (str(text), ours.key, "as PEM"),
        (locked.certificate, locked.key, "without a passphrase"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_tls(ServerConfig(tls_certificate=certificate, tls_key=key))
        assert words in str(caught.value)
    check_tls(ServerConfig())
    check_tls(config(ours))
    for server in (
        ServerConfig(tls_ca="/absent"),
        ServerConfig(tls_ca=str(text)),
        ServerConfig(tls_certificate=str(text)),
    ):
        with pytest.raises(ConfigError, match=r"server\.tls_.*a PEM file of certificates"):
            client_context(server)
