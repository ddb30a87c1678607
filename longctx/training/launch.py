"""The ranks of one machine as plain processes, without Ray.

Each has a session of its own, so that a terminal's Ctrl-C reaches the launcher alone, which passes it on; and ends with
the launcher whatever becomes of that (``longctx/training/rank_process.py``). What rank 0 prints is the command's
output; of the others only warnings and errors are.
"""

import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from longctx.errors import ConfigError
from longctx.heap import heap_env
from longctx.terminal_log import MARK
from longctx.training.config import TrainConfig
from longctx.training.gang import GRACE_S, is_bad, settle, supervise
from longctx.training.place import BODY, RankOrder, RankOutcome, find_port, make_places
from longctx.training.stop import STOP_SIGNALS

logger = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
POLL_S = 0.05
REAP_S = 5.0
TAIL_LINES = 15  # of what a rank printed, shown if it is lost


def launch_locally(config: TrainConfig, *, stop: threading.Event, body: str = BODY) -> dict[str, Any]:
    """Run all ranks here; returns rank 0's report.

    Args:
        config: of the training.
        stop: once set, ranks are asked to save and end.
        body: what a rank runs, as ``"module:function"``.

    Raises:
        LongctxError: what a rank raised of the project's own, or that ranks were lost too often.
    """
    world_size = config.parallel.dp_degree * config.parallel.sp_degree
    _check_gpus(config.model.device, world_size)

    def attempt(restart: int) -> dict[str, Any]:
        places = make_places(["localhost"] * world_size, address=ADDRESS, port=find_port(ADDRESS), restart=restart)
        ranks: list[RankProcess] = []
        try:
            for place in places:
                ranks.append(RankProcess(RankOrder(config, place, body)))
            return _wait(ranks, stop)
        finally:
            for rank in ranks:
                rank.kill()

    return supervise(attempt, max_restarts=config.cluster.max_restarts, stop=stop)


class RankProcess:
    """One rank, started by its construction."""

    def __init__(self, order: RankOrder) -> None:
        place = order.place
        self.rank = place.global_rank
        self._outcome = tempfile.TemporaryFile()  # noqa: SIM115 - kill closes it; without a name, nothing is left
        fd = self._outcome.fileno()
        # -P: a file beside which the user works must not be taken for a module.
        words = [sys.executable, "-P", "-m", "longctx.training.rank_process", str(fd)]
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        output = None if self.rank == 0 else subprocess.PIPE
        # Inherited: a request to stop waits until the rank can take it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process = subprocess.Popen(
                words,
                env=os.environ
                | heap_env(order.config.train.compact_heap)
                | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": _pick_gpu(place.local_rank)},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output and subprocess.STDOUT,
                pass_fds=(fd,),
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.pid = self._process.pid
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader: threading.Thread | None = None
        if self._process.stdout is not None:
            self._reader = threading.Thread(target=self._forward, args=(self._process.stdout,), daemon=True)
            self._reader.start()
        assert self._process.stdin is not None
        try:
            pickle.dump(order, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            logger.debug("rank %d ended before it had its order", self.rank)

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def read_outcome(self) -> RankOutcome | None:
        """Of a rank that has ended; None if it was lost."""
        if self._process.returncode != 0:
            return None
        self._outcome.seek(0)
        return pickle.load(self._outcome)

    def describe_loss(self) -> str:
        """How it ended, and the last that it printed."""
        code = self._process.returncode
        if code < 0:
            name = signal.Signals(-code).name
            end = f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        else:
            end = f"ended with exit code {code}"
        if self._reader is not None:
            self._reader.join(1.0)
        return "\n".join([f"{end} (pid {self.pid})", *self._tail])

    def ask_to_stop(self) -> None:
        """Let it save its state and end."""
        if self.is_alive:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and whatever it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(REAP_S)
        if self._reader is not None:
            self._reader.join(REAP_S)
        for pipe in (self._process.stdin, self._process.stdout, self._outcome):
            with suppress(BrokenPipeError):  # an order that nobody read
                if pipe is not None:
                    pipe.close()

    def _forward(self, pipe: IO[bytes]) -> None:
        for raw in pipe:
            line = raw.decode(errors="replace").rstrip("\n")
            if line.startswith(MARK):
                sys.stderr.write(line.removeprefix(MARK) + "\n")
            else:
                self._tail.append(line)


def _wait(ranks: list[RankProcess], stop: threading.Event) -> dict[str, Any]:
    """Until all ranks have ended, or one did badly and the others had time to say why."""
    outcomes: dict[int, RankOutcome] = {}
    lost: dict[int, str] = {}
    was_told, deadline = False, float("inf")
    while len(outcomes) + len(lost) < len(ranks) and time.monotonic() < deadline:
        if stop.is_set() and not was_told:
            was_told = True
            for rank in ranks:
                rank.ask_to_stop()
        for rank in ranks:
            if rank.is_alive or rank.rank in outcomes or rank.rank in lost:
                continue
            outcome = rank.read_outcome()
            if outcome is None:
                lost[rank.rank] = rank.describe_loss()
            else:
                outcomes[rank.rank] = outcome
            if is_bad(outcome):
                deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(POLL_S)
    return settle(outcomes, lost)


def _pick_gpu(local_rank: int) -> str:
    """The GPU that a rank sees: one each, where there are so many."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(local_rank)
    names = _split(visible)
    return names[local_rank] if local_rank < len(names) else ""


def _check_gpus(device: str, num_ranks: int) -> None:
    """Raise ``ConfigError`` if some ranks would have a GPU and others none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    num_gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if visible is not None:
        num_gpus = min(num_gpus, len(_split(visible)))
    if device != "cpu" and 0 < num_gpus < num_ranks:
        raise ConfigError(
            f"model.device={device} is not allowed: {num_ranks} ranks (parallel.dp_degree x parallel.sp_degree) have "
            f"{num_gpus} GPUs, and each takes one; model.device=cpu, or {num_gpus} ranks"
        )


def _split(visible: str) -> list[str]:
    return [name for name in visible.split(",") if name]
