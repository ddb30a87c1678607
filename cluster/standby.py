"""Two processes of the endpoint on one host: one serves, the other stands by and takes over when it dies or freezes.

Who serves holds a lock on a file, which the kernel frees however it ends, and counts in it a few times a second from a
thread of its own; through memory, so that no slow disk makes it look frozen. Who stands by has loaded everything, so
that it takes over in a moment: starting a process and its imports takes longer than clients should wait. It kills one
that has not counted for ``patience_s`` (it is frozen, or stuck in compiled code) before it takes the lock. Removing the
file ends the standing by.
"""

import fcntl
import logging
import mmap
import os
import signal
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

BEAT_S = 0.2
_CONTENT = struct.Struct("<QQ")  # process id of who serves, and its count


class Turn:
    """This process's part in it.

    Args:
        path: of the file, in a folder that both processes see.
        patience_s: see the module's docstring.
    """

    def __init__(self, path: Path, *, patience_s: float) -> None:
        self._path, self._patience_s = path, patience_s
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, _CONTENT.size)  # of what is there, nothing changes
        self._content = mmap.mmap(self._fd, _CONTENT.size)
        self._seen = (0, 0.0)  # the last count, and when it was new
        self._is_closed = threading.Event()

    def take(self) -> bool:
        """Whether it is this process's turn; if so, it is until ``close``."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        _CONTENT.pack_into(self._content, 0, os.getpid(), 1)
        threading.Thread(target=self._beat, name="turn", daemon=True).start()
        return True

    def is_over(self) -> bool:
        """Whether the deployment is ending."""
        return not self._path.exists()

    def free_from_frozen(self) -> None:
        """Kill who serves, if it has been silent for too long. To be called often."""
        (pid, count), now = _CONTENT.unpack_from(self._content), time.monotonic()
        if count != self._seen[0]:
            self._seen = count, now
        elif count and now - self._seen[1] > self._patience_s:
            logger.error("the endpoint (process %d) has been silent for %g s: it is killed", pid, self._patience_s)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._seen = count, now  # the lock is free in a moment

    def close(self) -> None:
        """Somebody else's turn. Idempotent."""
        if not self._is_closed.is_set():
            self._is_closed.set()
            os.close(self._fd)

    def _beat(self) -> None:
        count = 1
        while not self._is_closed.wait(BEAT_S):
            count += 1
            _CONTENT.pack_into(self._content, 0, os.getpid(), count)
