"""The records of a run's steps, written to every place that is configured.

A place that cannot be written any more, as on a full disk, is given up with a warning: training goes on.
"""

import logging
import statistics
import sys
from collections import deque
from pathlib import Path

from longctx.training.config import LoggerConfig
from longctx.training.record import StepRecord
from longctx.training.sinks import SINKS
from longctx.training.sinks.sink import LoggedRun, Sink
from longctx.training.sinks.wandb import is_wanted

logger = logging.getLogger(__name__)

_NUM_RECENT = 50  # steps whose median speed the ETA goes by


def open_step_log(
    config: LoggerConfig, output: Path, *, num_steps: int, is_first: bool, start_step: int = 0
) -> "StepLog":
    """The log of one rank.

    Args:
        config: what is shown and recorded.
        output: the run's folder.
        num_steps: of the whole run.
        is_first: whether this is global rank 0; the others write nothing.
        start_step: steps that an earlier start of the run has done.

    Raises:
        ConfigError: if ``logger.wandb`` asks for what is not installed.
    """
    run = LoggedRun(config, output, num_steps, start_step)
    names = _choose_sinks(config) if is_first else []
    return StepLog({name: SINKS.get(name)(run) for name in names})


class StepLog:
    """Hands each record to every sink, by name."""

    def __init__(self, sinks: dict[str, Sink]) -> None:
        self._sinks = sinks
        self._seconds: deque[float] = deque(maxlen=_NUM_RECENT)

    def write(self, record: StepRecord) -> None:
        """Note a step."""
        self._seconds.append(record.seconds)
        eta_s = statistics.median(self._seconds) * (record.num_steps - record.step)
        for name, sink in list(self._sinks.items()):
            try:
                sink.write(record, eta_s)
            except OSError as error:
                del self._sinks[name]
                logger.warning("step %d: %s is not written any more: %s", record.step, name, error)

    def close(self) -> None:
        """Finish every file; no more records come."""
        for name, sink in self._sinks.items():
            try:
                sink.close()
            except OSError as error:
                logger.warning("%s could not be finished: %s", name, error)
        self._sinks = {}


def _choose_sinks(config: LoggerConfig) -> list[str]:
    shows_bar = config.progress == "true" or (config.progress == "auto" and sys.stderr.isatty())
    names = ["metrics", "progress" if shows_bar else "lines"]
    if config.tensorboard:
        names.append("tensorboard")
    if is_wanted(config):
        names.append("wandb")
    return names
