"""Whether this rank was asked to end: how Ctrl-C, SIGTERM and a job's stop reach the training loop.

A rank has its process to itself, so this is the process's, as its signals are. Ranks are told one after the other: the
loop has to agree on the step after which all of them end.
"""

import signal
import threading

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REQUESTED = threading.Event()


def request_stop() -> None:
    """Ask this process's rank to save its state and return; from any thread."""
    _REQUESTED.set()


def is_stop_requested() -> bool:
    """Whether it was asked to."""
    return _REQUESTED.is_set()


def stop_on_signals() -> None:
    """SIGINT and SIGTERM ask for it from now on; those that waited, blocked, come at once. On the main thread."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: request_stop())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
