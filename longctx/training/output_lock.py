"""One training at a time in an output folder: two would write each other's checkpoints."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longctx.errors import ConfigError

NAME = "lock"


@contextmanager
def lock_output(folder: Path) -> Iterator[None]:
    """Hold ``folder``, which is made if it is missing; the kernel lets go of it with this process, however that ends.

    Raises ``ConfigError`` naming the process that has it, or why there can be no such folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / NAME).open("a+")
    except OSError as error:
        raise ConfigError(f"output={folder} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ConfigError(
                f"output={folder} is not allowed: {owner} trains into it; wait for it, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
        file.truncate(0)
