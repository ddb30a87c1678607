"""One line a step through ``logging``, for terminals without a bar and for files."""

import logging

from longctx.training.record import StepRecord
from longctx.training.sinks.sink import LoggedRun, Sink

logger = logging.getLogger(__name__)


class StepLines(Sink):
    """Every ``logger.every`` steps, and of the first, the last and each evaluated one."""

    def __init__(self, run: LoggedRun) -> None:
        self._every, self._first = run.config.every, run.start_step + 1

    def write(self, record: StepRecord, eta_s: float) -> None:
        is_shown = record.step % self._every == 0 or record.step in (self._first, record.num_steps)
        if is_shown or record.eval_loss is not None:
            logger.info("%s", describe_step(record, eta_s))


def describe_step(record: StepRecord, eta_s: float) -> str:
    """A step in one line of text."""
    width = len(str(record.num_steps))
    words = [
        f"step {record.step:>{width}}/{record.num_steps}",
        f"loss {record.loss:.4f}",
        f"{record.tokens_per_s:,.0f} tokens/s",
        f"{record.flops_share:.0%} of peak FLOP/s",
        f"{max(record.memory_bytes) / 2**30:.2f} GiB",
        f"grad norm {record.grad_norm:.3g}",
        f"lr {record.lr:.2e}",
        f"ETA {describe_duration(eta_s)}",
    ]
    if record.num_skipped_rows:
        words.append(f"{record.num_skipped_rows} rows skipped")
    if record.eval_loss is not None:
        words.append(f"eval loss {record.eval_loss:.4f}")
    return "  ".join(words)


def describe_duration(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
