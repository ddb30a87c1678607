"""A node's address, and the network interface that has it."""

import socket

import psutil

from longctx.errors import LongctxError


def interface_of(address: str) -> str:
    """The interface that has ``address``: gloo would take the one of the host's name."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    raise LongctxError(f"no interface of {socket.gethostname()} has the address {address}")
