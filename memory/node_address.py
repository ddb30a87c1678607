"""The address by which other nodes reach this one."""

import socket

_ANY_ROUTED_ADDRESS = ("192.0.2.1", 9)  # reserved for documentation; nothing is sent to it


def node_address() -> str:
    """This node's address on its default route; the loopback address if it has no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ANY_ROUTED_ADDRESS)
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]
