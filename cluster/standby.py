"""Two processes of the endpoint on one host: one serves, the other stands by and takes over when it dies or freezes.

Who serves holds a lock on a file, which the kernel frees however it ends, and touches the file a few times a second
from a thread of its own. Who stands by has loaded everything, so that it takes over in a moment: starting a process
and its imports takes longer than clients should wait. It kills one that has not touched the file for ``patience_s``
(it is frozen, or stuck in compiled code) before it takes the lock. Removing the file ends the standing by.
"""

import fcntl
import logging
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

BEAT_S = 0.2


class Turn:
    """This process's part in it.

    Args:
        path: of the file, in a folder that both processes see.
        patience_s: see the module's docstring.
    """

    def __init__(self, path: Path, *, patience_s: float) -> None:
        self._path, self._patience_s = path, patience_s
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._seen = (0, 0.0)  # what the file said of its last touch, and when that was new
        self._is_closed = threading.Event()

    def take(self) -> bool:
        """Whether it is this process's turn; if so, it is until ``close``."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.truncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)
        threading.Thread(target=self._beat, name="turn", daemon=True).start()
        return True

    def is_over(self) -> bool:
        """Whether the deployment is ending."""
        return not self._path.exists()

    def free_from_frozen(self) -> None:
        """Kill who serves, if it has been silent for too long. To be called often."""
        touched, now = os.fstat(self._fd).st_mtime_ns, time.monotonic()
        if touched != self._seen[0]:
            self._seen = touched, now
        elif now - self._seen[1] > self._patience_s and (pid := self._read_pid()):
            logger.error("the endpoint (process %d) has been silent for %g s: it is killed", pid, self._patience_s)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._seen = touched, now  # the lock is free in a moment

    def close(self) -> None:
        """Somebody else's turn. Idempotent."""
        if not self._is_closed.is_set():
            self._is_closed.set()
            os.close(self._fd)

    def _read_pid(self) -> int | None:
        text = os.pread(self._fd, 20, 0).decode()
        return int(text) if text.isdigit() and int(text) != os.getpid() else None

    def _beat(self) -> None:
        while not self._is_closed.wait(BEAT_S):
            with suppress(OSError):  # it is being closed
                os.utime(self._fd)
