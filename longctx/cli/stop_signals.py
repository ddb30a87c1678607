"""Ctrl-C and its kin at a command that has something to end in order: the first asks, the second forces."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

TWICE_S = 0.5  # ``timeout`` sends a signal to the command and to its group: two within this time are one
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C; kill, systemd, containers; a closed terminal


class ForcedStop(KeyboardInterrupt):
    """A second signal came. A ``KeyboardInterrupt`` itself that passes through ``exec`` of a text, as imports do, makes
    CPython end with SIGINT instead of the exit code, although it was caught."""


@contextmanager
def ask_on_signals() -> Iterator[threading.Event]:
    """An event that the first signal sets; a second one raises ``ForcedStop`` in the main thread."""
    asked = threading.Event()
    first = 0.0
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if previous[signal.SIGHUP] is signal.SIG_IGN:
        del previous[signal.SIGHUP]  # nohup

    def on_signal(number: int, _: object) -> None:
        nonlocal first
        if asked.is_set() and time.monotonic() - first < TWICE_S:
            return
        if asked.is_set():
            logger.warning("forced to stop")
            raise ForcedStop
        first = time.monotonic()
        asked.set()
        logger.info("%s: stopping; once more forces it", signal.Signals(number).name)

    try:
        for number in previous:
            signal.signal(number, on_signal)
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
