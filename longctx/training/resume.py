"""What a run goes on from. Rank 0 looks and all ranks go by what it found, so that none of them starts elsewhere."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longctx.errors import CheckpointError
from longctx.training.checkpoints import FOLDER, CheckpointReader, list_checkpoints
from longctx.training.config import TrainConfig

logger = logging.getLogger(__name__)

_PLACES = ("output", "cluster", "logger", "checkpoint", "parallel", "deepspeed")  # change no result


def find_checkpoint(config: TrainConfig, *, restart: int) -> CheckpointReader | None:
    """The newest checkpoint, if ``checkpoint.resume`` lets the run go on from it. Collective.

    Args:
        config: of the run.
        restart: how often its ranks were started again: a run that went on from nothing then goes on from its own.

    Raises:
        CheckpointError: there must be one and is none, or it cannot be read here.
    """
    output, resume = Path(config.output), config.checkpoint.resume
    found: list[str | None] = [None]
    if dist.get_rank() == 0:
        if resume == "never" and not restart:
            set_aside(output)
        checkpoints = list_checkpoints(output)
        found = [str(checkpoints[-1])] if checkpoints else found
    dist.broadcast_object_list(found, 0)
    if found[0] is not None:
        reader = CheckpointReader(Path(found[0]))
        if dist.get_rank() == 0:
            _tell(reader, config)
        return reader
    if resume == "must" and not restart:
        raise CheckpointError(f"{config.output}: there is no checkpoint, and checkpoint.resume is must")
    return None


def check_weights(reader: CheckpointReader, shapes: dict[str, list[int]], config: TrainConfig) -> None:
    """Raise ``CheckpointError`` naming what differs if the checkpoint does not have just the weights of ``shapes``."""
    saved = reader.state["shapes"]
    differing = [name for name in sorted(saved.keys() | shapes.keys()) if saved.get(name) != shapes.get(name)]
    if not differing:
        return
    name = differing[0]
    changes = [
        each for each in describe_changes(reader.state["config"], config) if each.startswith(("model.", "peft."))
    ]
    raise CheckpointError(
        f"{reader.folder} is of another model or adapter: {len(differing)} weights differ; {name} is "
        f"{saved.get(name, 'not there')} in it, and {shapes.get(name, 'not there')} in what is trained"
        + (f"; {', '.join(changes)}" if changes else "")
        + "; use the model and peft that it was made with, or another output"
    )


def set_aside(output: Path) -> None:
    """Move an earlier run's checkpoints away: among the new ones they would count as the newest."""
    if not list_checkpoints(output):
        return
    number = 1
    while (aside := output / f"{FOLDER}-{number}").exists():
        number += 1
    (output / FOLDER).rename(aside)
    logger.warning("checkpoint.resume=never: the checkpoints that were in %s are in %s now", output / FOLDER, aside)


def describe_changes(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """``key=value (was value)`` of settings that a checkpoint was made with otherwise."""
    before = dict(_flatten(saved))
    now = _flatten(dataclasses.asdict(config))
    return [f"{key}={value} (was {before.get(key)})" for key, value in now if before.get(key) != value]


def _tell(reader: CheckpointReader, config: TrainConfig) -> None:
    logger.info("going on from %s", reader.folder)
    changes = describe_changes(reader.state.get("config", {}), config)
    if changes:
        logger.warning("settings that differ from the checkpoint's: %s", ", ".join(changes))


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if not prefix and name in _PLACES:
            continue
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
