"""Fuzzing by hypothesis: the same examples every time, a few in the default run and more under the marker ``slow``.

``LONGCTX_FUZZ=2000 make slow`` has as many examples of each slow test as it says.
"""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUICK, MANY = 40, int(os.environ.get("LONGCTX_FUZZ", "300"))  # examples of one test


def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], *, num_examples: int) -> None:
    """Call ``check`` with so many examples; what fails is made as small as can be."""
    limits = settings(
        max_examples=num_examples, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
    )
    limits(given(strategy)(check))()


def hang_up(connection: socket.socket) -> None:
    """Send nothing more; what comes can still be read. The other end may have ended it before."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
