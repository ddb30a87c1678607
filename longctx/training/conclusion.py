"""What a run leaves when its last checkpoint is written: the exported model and the report."""

import logging
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from longctx.errors import LongctxError, TrainingError
from longctx.training.checkpoints import CheckpointReader, list_checkpoints, rank_checkpoints
from longctx.training.config import TrainConfig
from longctx.training.report import write_report

logger = logging.getLogger(__name__)


def conclude_run(
    output: Path, config: TrainConfig, *, export: Callable[[CheckpointReader, Path], Path] | None
) -> Path | None:
    """Write the report and, if the run is done and wants it, the model, whose folder is returned. On one rank.

    Args:
        output: of the run, with its last checkpoint.
        config: of the run.
        export: writes a checkpoint's model into a folder; None: there is to be none.

    Raises:
        TrainingError: the model cannot be written; nothing is lost.
    """
    last, final = list_checkpoints(output)[-1], None
    if export is not None:
        final = output / "final"
        try:
            export(CheckpointReader(last), final)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{final} could not be written: {error}; the same command tries again, {last} has what it needs"
            ) from error
    best = rank_checkpoints(output)[0] if config.checkpoint.keep_best else None
    try:
        report = write_report(output, config, final=final, checkpoint=last, best=best)
        logger.info("report: %s%s", report, f"; model: {final}" if final else "")
    except (OSError, LongctxError) as error:
        logger.warning("no report: %s", error)
    return final
