"""Whether a running Ray can be joined: asked before ``ray.init``, which would try for minutes and not say why."""

import os

import grpc

from longctx.errors import ConfigError

TIMEOUT_S = 5.0
METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId"  # the first thing that Ray's own client asks
TOKEN_HINT = (
    "it takes RAY_AUTH_MODE=token and the cluster's own token, in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray"
)


def check_address(address: str, key: str = "ray.address") -> None:
    """Raise ``ConfigError`` saying why the Ray at ``address`` (``HOST:PORT`` or ``auto``) cannot be joined; ``key`` is
    the configuration's."""
    try:
        _check(address)
    except ConfigError as error:
        raise ConfigError(f"{key}={address!r} cannot be joined: {error}") from None


def _check(address: str) -> None:
    if "://" in address:
        raise ConfigError("give HOST:PORT of the head node; Ray Client (ray://) is not enough to run workers")
    from ray._private import services

    try:
        found = services.canonicalize_bootstrap_address(address)
    except (ValueError, ConnectionError, OSError) as error:
        raise ConfigError(f"HOST:PORT or auto is expected ({error})") from None
    if found is None:
        raise ConfigError("no running Ray was found on this machine")
    _ask(found)


def _ask(target: str) -> None:
    """One call to the head node, with this process's token."""
    if os.environ.get("RAY_USE_TLS", "0") != "0":  # Ray's certificates are Ray's to check
        return
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(METHOD)(b"", timeout=TIMEOUT_S, metadata=_read_token())
        except grpc.RpcError as error:
            code, details = error.code(), error.details()  # type: ignore[attr-defined] - RpcError is a Call here
            if code is grpc.StatusCode.UNAUTHENTICATED:
                raise ConfigError(f"the cluster refuses this token, or its lack; {TOKEN_HINT}") from None
            raise ConfigError(f"no Ray answers at {target} ({details})") from None


def _read_token() -> tuple[tuple[str, str], ...]:
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined] - Cython, without stubs
    from ray.exceptions import AuthenticationError

    try:
        return tuple(AuthenticationTokenLoader.instance().get_token_for_http_header().items())
    except AuthenticationError:
        raise ConfigError(f"RAY_AUTH_MODE=token, and no token is found; {TOKEN_HINT}") from None
