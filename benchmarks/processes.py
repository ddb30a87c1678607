"""Process trees that a benchmark starts: their memory, their output, and their end."""

import logging
import os
import re
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

logger = logging.getLogger(__name__)

STOP_S = 30.0  # for a server to end by itself after SIGTERM
KILL_S = 5.0


class ProcessTree:
    """A program and everything it starts.

    Args:
        command: program and arguments.
        log: file for what it writes to stderr, and to stdout unless ``piped``.
        env: added to this process's environment.
        cwd: working directory.
        piped: give it pipes as stdin and stdout.
    """

    def __init__(
        self, command: Sequence[str], log: Path, *, env: Mapping[str, str], cwd: Path, piped: bool = False
    ) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env=os.environ | dict(env),
                cwd=cwd,
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else output,
                stderr=output,
                start_new_session=True,
                text=True,
                bufsize=1,
            )

    def check_alive(self) -> None:
        """Raises ``RuntimeError`` with the end of the log if the program has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.log.stem} ended with status {self.process.returncode}: {self.log_tail()}")

    def log_tail(self, num_chars: int = 800) -> str:
        """The end of what it wrote."""
        return self.log.read_text(errors="replace")[-num_chars:].strip()

    def memory_bytes(self) -> int:
        """Proportional set size of all processes together: memory they share counts once."""
        return sum(_pss_bytes(process.pid) for process in self._processes())

    def stop(self) -> None:
        """End it all: SIGTERM to the program, then SIGKILL to whatever of its tree is left."""
        processes = self._processes()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                logger.warning("%s did not stop within %.0f s", self.log.stem, STOP_S)
        _, alive = psutil.wait_procs(processes, timeout=KILL_S)
        for process in alive:
            logger.warning("killing %s, left behind by %s", process, self.log.stem)
            process.kill()
        psutil.wait_procs(alive, timeout=KILL_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _processes(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


class MemorySampler:
    """Samples a tree's memory while a block runs; ``peak_bytes`` is the highest seen.

    Walking page tables costs time that would be the measured program's, so blocks that are timed go without.
    """

    def __init__(self, tree: ProcessTree, *, interval_s: float = 0.5) -> None:
        self._tree = tree
        self._interval_s = interval_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self._tree.memory_bytes())
            if self._done.wait(self._interval_s):
                self.peak_bytes = max(self.peak_bytes, self._tree.memory_bytes())
                return


def _pss_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it ended meanwhile
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
