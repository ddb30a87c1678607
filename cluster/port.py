"""The endpoint's address: a socket that listens there, or the reason why none can."""

import socket

from cluster.config import ServerConfig
from longctx.errors import ConfigError

BACKLOG = 2048


def listen(server: ServerConfig) -> socket.socket:
    """A socket that listens on ``server.host`` and ``server.port``; raises ``ConfigError`` if this machine cannot."""
    if not server.host:  # bind would take it for every address of the machine
        raise ConfigError("server.host='' is not allowed: an address, as 127.0.0.1, or 0.0.0.0 for all")
    listener = socket.socket(socket.AF_INET6 if ":" in server.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((server.host, server.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(
            f"server.host={server.host} server.port={server.port} cannot be listened on: {reason}; "
            "choose another, as server.port=8001"
        ) from None
    return listener


def check_port(server: ServerConfig) -> None:
    """Raises ``ConfigError`` as ``listen`` does."""
    listen(server).close()
