"""Processes that tests start, forked from one that has loaded what they need: in a tenth of a second instead of six.

A Python process has one fork server. What all tests need is therefore loaded in one place, ``tests/preload.py``.
"""

import multiprocessing
import os
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preload"])


def start_process(function: Callable[..., None], *arguments: Any, context: Any = FORKS) -> BaseProcess:
    """A process that runs ``function`` and dies with this one; ``context``: another way to start it."""
    process = context.Process(target=function, args=arguments, daemon=True)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the process that is forked, which the first one starts
    try:
        process.start()
    finally:
        with suppress(KeyError):
            del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    return process
