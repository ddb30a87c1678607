"""A bar at the bottom of the terminal that says what a line of the log would."""

import logging
import shutil
import sys

from longctx.training.record import StepRecord
from longctx.training.sinks.lines import describe_step
from longctx.training.sinks.sink import LoggedRun, Sink

_CLEAR_LINE = "\r\x1b[K"
_BAR_SIZE = 20  # characters
_DEFAULT_COLUMNS = 120  # where the terminal does not say


class ProgressBar(Sink):
    """Drawn anew in every step; lines that others log push it down."""

    def __init__(self, run: LoggedRun) -> None:
        self._stream = sys.stderr
        self._eraser = _Eraser()
        logging.getLogger().handlers.insert(0, self._eraser)  # before those that write lines

    def write(self, record: StepRecord, eta_s: float) -> None:
        columns = shutil.get_terminal_size((_DEFAULT_COLUMNS, 24)).columns
        done = _BAR_SIZE * record.step // record.num_steps
        text = f"{'█' * done}{'░' * (_BAR_SIZE - done)}  {describe_step(record, eta_s)}"
        end = "\n" if record.eval_loss is not None else ""  # stays in sight
        self._stream.write(_CLEAR_LINE + (text if end else text[: columns - 1]) + end)
        self._stream.flush()

    def close(self) -> None:
        logging.getLogger().removeHandler(self._eraser)
        self._stream.write("\n")
        self._stream.flush()


class _Eraser(logging.Handler):
    """Clears the bar's line before another handler writes there."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(_CLEAR_LINE)
