"""The contract of a place that records of steps go to, and what the run tells each when it is opened."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from longctx.training.config import LoggerConfig
from longctx.training.record import StepRecord


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """What sinks know of a run; ``start_step`` steps were done before it."""

    config: LoggerConfig
    output: Path
    num_steps: int
    start_step: int


class Sink(ABC):
    """One place. Made from a ``LoggedRun``; ``OSError`` from any method means that the place cannot be written."""

    @abstractmethod
    def write(self, record: StepRecord, eta_s: float) -> None:
        """Note a step; at its speed the run ends in ``eta_s`` seconds."""

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """After the last step, or when the run ends early."""
