"""A Ray of our own on this machine, or a connection to one that runs; and leaving it as it was found.

Our own has a token of its own (Ray 2.60's token authentication), a temporary folder of its own, no dashboard, and stops
with us: every process of it is gone when ``stop`` returns. Killed with SIGKILL, we leave the folder, which the next
start sweeps, while its processes end by themselves: Ray's daemons follow their parent, the workers follow the daemons.
"""

import atexit
import ctypes
import fcntl
import logging
import os
import re
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from cluster.config import RayConfig
from cluster.ray_address import check_address
from cluster.terminal import show_workers
from longctx.cli.stop_signals import STOP_SIGNALS
from longctx.errors import ConfigError, LongctxError
from longctx.threads import THREAD_ENV
from parallel.option import parse_size

logger = logging.getLogger(__name__)

TEMP_ROOT = Path("/tmp")  # short: Unix socket names are
_TEMP_NAME = re.compile(r"longctx-ray-(\d+)-\w+")
STOP_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 5.0
DAEMONS = ("gcs_server", "raylet")  # of a local Ray: nothing works without them
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
QUIET_ENV = {
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # it takes SIGTERM away from us, and aborts
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

# What a Ray of our own does beside our work, on the cores that compute.
LEAN_ENV = {
    "RAY_task_events_report_interval_ms": "0",  # a record of every call, for Ray's dashboard, which is not started
    "RAY_enable_metrics_collection": "0",  # /metrics is ours
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}


class RaySession:
    """A connection to Ray for the life of one command.

    Args:
        config: which Ray.
        shares_cores: several workers of a local one compute.
        address_key: the configuration key of its address, for error messages.
    """

    def __init__(self, config: RayConfig, *, shares_cores: bool = True, address_key: str = "ray.address") -> None:
        self._config, self._address_key = config, address_key
        self._env = QUIET_ENV | (THREAD_ENV if shares_cores else {}) | (LEAN_ENV if config.address is None else {})
        self._temp_dir: Path | None = None
        self._temp_lock = -1  # held as long as this process lives
        self._daemons: list[psutil.Process] = []  # of a local Ray
        self._ray: Any = None  # the module, once it is imported: a signal in the middle leaves it unusable

    @property
    def folder(self) -> Path | None:
        """Of a local Ray, gone when it stops."""
        return self._temp_dir

    @property
    def is_local(self) -> bool:
        """Whether the Ray is ours to stop."""
        return self._config.address is None

    def is_running(self) -> bool:
        """Whether we are connected and, for a local Ray, its daemons live: a call to dead ones blocks for a minute, and
        then Ray's client ends this process."""
        return self._ray is not None and self._ray.is_initialized() and all(_lives(daemon) for daemon in self._daemons)

    def start(self) -> None:
        """Connect, starting a local Ray unless it has an address. Raises ``LongctxError`` saying why it cannot."""
        for name, value in self._env.items():
            os.environ.setdefault(name, value)
        if self.is_local:
            # A token of our own, whatever the user's environment says of other clusters.
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            for name in ("RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
                os.environ.pop(name, None)
            atexit.register(self._remove_folder)  # before Ray's own, so after it: that writes there once more
        import ray  # only now: it reads the authentication mode when it is imported

        self._ray = ray
        address = self._config.address
        try:
            with _hold_signals(), _keep_signal_handlers(), _shield_daemons():
                if address is None:
                    self._start_local()
                else:
                    check_address(address, self._address_key)
                    ray.init(
                        address=address,
                        namespace=self._config.namespace,
                        logging_level=logging.WARNING,
                        log_to_driver=True,
                    )
        except ConfigError:
            raise
        except ConnectionError as error:
            raise ConfigError(f"{self._address_key}={address!r} cannot be joined: {error}") from None
        except Exception as error:  # Ray's reasons are many; each ends the start, and is told
            raise LongctxError(f"Ray cannot be started: {error}") from error
        show_workers()

    def stop(self) -> None:
        """Disconnect; a local Ray is stopped, and whatever of it does not go is killed."""
        if self._ray is None:
            return
        is_whole = self.is_running()
        self._ray.shutdown()
        # What did not start, or has died, has nothing to end in peace.
        self._remove(timeout_s=STOP_TIMEOUT_S if is_whole else 0.0)
        if self._daemons and not is_whole:
            _sweep_segments()  # of workers that ended with it

    def kill(self) -> None:
        """Stop a local Ray at once, also when ``stop`` was interrupted."""
        self._remove(timeout_s=0.0)

    def _remove(self, *, timeout_s: float) -> None:
        if self._temp_dir is None:
            return
        if left := _wait_for_descendants(timeout_s):
            deadline = time.monotonic() + KILL_TIMEOUT_S
            while left and time.monotonic() < deadline:
                for process in left:
                    with suppress(psutil.NoSuchProcess):
                        if timeout_s:
                            logger.warning("killing %s (pid %d), which did not stop", process.name(), process.pid)
                        process.kill()
                left = _wait_for_descendants(0.2)
            _sweep_segments()
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._temp_dir is not None:
            shutil.rmtree(self._temp_dir, ignore_errors=True)

    def _start_local(self) -> None:
        import ray

        _sweep()
        # What a dying raylet had just started becomes our child, not init's: nothing of it is out of sight in the end.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._temp_dir = Path(tempfile.mkdtemp(prefix=f"longctx-ray-{os.getpid()}-", dir=TEMP_ROOT))
        self._temp_lock = os.open(self._temp_dir, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._temp_lock, fcntl.LOCK_EX)
        ray.init(
            address="local",
            num_cpus=self._config.num_cpus or len(os.sched_getaffinity(0)),
            namespace=self._config.namespace,
            object_store_memory=max(parse_size(self._config.object_store_bytes), 80 * 2**20),
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=True,
            _temp_dir=str(self._temp_dir),
        )
        self._daemons = [child for child in psutil.Process().children() if child.name() in DAEMONS]


def _wait_for_descendants(timeout_s: float) -> list[psutil.Process]:
    """Reap what ends within ``timeout_s`` of the processes below this one; returns those that are left."""
    deadline = time.monotonic() + timeout_s
    while left := psutil.Process().children(recursive=True):
        if time.monotonic() >= deadline:
            break
        psutil.wait_procs(left, min(0.2, max(0.0, deadline - time.monotonic())))
    return left


@contextmanager
def _hold_signals() -> Iterator[None]:
    """The first signal waits for the end of ``ray.init``: raised there, it would leave a half connected client, which
    crashes at our end. A second one does not wait."""
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    taken = {number: handler for number, handler in handlers.items() if callable(handler)}

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            taken[signal.Signals(number)](number, frame)
        logger.info("%s: stopping once Ray has started", signal.Signals(number).name)
        held.append(number)

    for number in taken:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
        if len(held) == 1:
            signal.raise_signal(held[0])


@contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """``ray.init`` would replace the handler of SIGTERM by one that exits there and then."""
    from ray._private import utils

    replaced, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = replaced


@contextmanager
def _shield_daemons() -> Iterator[None]:
    """A signal to our process group, as ``timeout`` and terminals send it, is ours to handle: Ray's daemons get a group
    of their own, or SIGTERM would end them while we still ask them to stop the workers."""
    from ray._private import services

    class Shielded(services.ConsolePopen):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"process_group": 0} | kwargs)

    replaced, services.ConsolePopen = services.ConsolePopen, Shielded
    try:
        yield
    finally:
        services.ConsolePopen = replaced


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _sweep_segments() -> None:
    from memory.segment import sweep  # imports torch, which this process does without otherwise

    sweep()


def _sweep() -> None:
    """Remove this user's folders whose process is dead: its lock, which the kernel undoes, tells across containers."""
    for path in TEMP_ROOT.glob("longctx-ray-*"):
        match = _TEMP_NAME.fullmatch(path.name)
        if match is None or psutil.pid_exists(int(match[1])):
            continue
        with suppress(OSError):  # removed meanwhile, locked, or not ours
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_uid == os.getuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
            finally:
                os.close(fd)
