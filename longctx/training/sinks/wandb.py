"""A run at Weights & Biases, if its package is installed. The one module that knows it."""

import os
import uuid
from importlib import import_module
from importlib.util import find_spec

from longctx.errors import ConfigError
from longctx.training.config import LoggerConfig
from longctx.training.record import StepRecord
from longctx.training.sinks.scalars import list_scalars
from longctx.training.sinks.sink import LoggedRun, Sink

_ID_FILE = "wandb_run"  # in output: a run that goes on is the same one there


class WandbRun(Sink):
    """Logs to the project ``logger.wandb_project`` under the output folder's name."""

    def __init__(self, run: LoggedRun) -> None:
        id_path = run.output / _ID_FILE
        if not run.start_step or not id_path.exists():
            run.output.mkdir(parents=True, exist_ok=True)
            id_path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self._run = import_module("wandb").init(
            project=run.config.wandb_project,
            name=run.output.name,
            id=id_path.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run.output),
        )

    def write(self, record: StepRecord, eta_s: float) -> None:
        self._run.log(list_scalars(record), step=record.step)

    def close(self) -> None:
        self._run.finish()


def is_wanted(config: LoggerConfig) -> bool:
    """Whether a run logs there. Raises ``ConfigError`` if it is asked to and the package is missing."""
    is_installed = find_spec("wandb") is not None
    if config.wandb == "true" and not is_installed:
        raise ConfigError("logger.wandb=true is not allowed: the package wandb is not installed here")
    return config.wandb == "true" or (config.wandb == "auto" and is_installed and bool(os.environ.get("WANDB_API_KEY")))
