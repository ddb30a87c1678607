"""One training at a time in an output folder: two would write each other's checkpoints."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from longctx.errors import ConfigError

NAME, WRITER_NAME = "lock", "writer.lock"  # of the command, of rank 0
POLL_S = 0.1


@contextmanager
def lock_output(folder: Path, *, name: str = NAME, wait_s: float = 0.0) -> Iterator[None]:
    """Hold ``folder``, which is made if it is missing; the kernel lets go of it with this process, however that ends.

    Args:
        folder: of a run.
        name: of the lock.
        wait_s: for another process to let go of it.

    Raises ``ConfigError`` naming the process that has it, or why there can be no such folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("a+b", buffering=0)
    except OSError as error:
        raise ConfigError(f"output={folder} cannot be written: {error.strerror}") from None
    with file:
        deadline = time.monotonic() + wait_s
        while not (is_held := _try(file, folder)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if not is_held:
            file.seek(0)
            owner = file.read().decode().strip() or "another process"
            raise ConfigError(
                f"output={folder} is not allowed: {owner} trains into it; wait for it, or choose another folder"
            )
        with suppress(OSError):  # a full disk: the lock holds without the owner's name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
        with suppress(OSError):
            file.truncate(0)


def _try(file: IO[bytes], folder: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ConfigError(f"output={folder} cannot be locked: {error.strerror}; choose another file system") from None
    return True
