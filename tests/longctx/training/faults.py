"""The trainer, with what goes wrong in it at moments that a test chooses.

A test writes ``output/faults.json``: a list of ``{"attempt": 0, "rank": 1, "step": 3, "moment": ...}``.

    step    the rank is killed before it begins the step
    write   it is killed while it writes its part of the checkpoint of the step
    commit  it is killed before the checkpoint of the step is given its name
    full    its part of that checkpoint meets a full disk
    stop    it is asked to stop before the step, as by Ctrl-C
    freeze  it stops before the step, without a word
"""

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

from longctx.training import checkpoints, trainer
from longctx.training.config import TrainConfig
from longctx.training.place import RankPlace
from longctx.training.stop import request_stop

BODY = "tests.longctx.training.faults:train_rank"


def set_faults(output: Path, *faults: dict[str, Any]) -> None:
    """For the attempts that follow."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "faults.json").write_text(json.dumps(faults))


def train_rank(config: TrainConfig, place: RankPlace) -> dict[str, Any]:
    """See the module. A process of its own: nothing is put back."""
    faults = json.loads((Path(config.output) / "faults.json").read_text())
    for fault in faults:
        if fault.get("attempt", 0) == place.restart and fault.get("rank", 0) == place.global_rank:
            _PREPARE[fault["moment"]](fault["step"])
    return trainer.train_rank(config, place)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _before_step(act: Any) -> Any:
    def prepare(step: int) -> None:
        train_step = trainer.TrainingRun.train_step

        def train_step_or_act(run: Any) -> Any:
            if run._step + 1 == step:
                act()
            return train_step(run)

        trainer.TrainingRun.train_step = train_step_or_act

    return prepare


def _at_write(step: int) -> None:
    def write_half(tensors: Any, path: Path) -> None:
        save(tensors, path)
        if checkpoints.name_checkpoint(step) in str(path):
            os.truncate(path, path.stat().st_size // 2)
            _die()

    save = checkpoints.save_file
    checkpoints.save_file = write_half


def _at_commit(step: int) -> None:
    def write_json_or_die(path: Path, content: Any) -> None:
        write_json(path, content)
        if path.name == checkpoints.STATE_FILE and content["step"] == step:
            _die()

    write_json = checkpoints._write_json
    checkpoints._write_json = write_json_or_die


def _at_full_disk(step: int) -> None:
    def save_or_fail(tensors: Any, path: Path) -> None:
        if checkpoints.name_checkpoint(step) in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    save = checkpoints.save_file
    checkpoints.save_file = save_or_fail


_PREPARE = {
    "step": _before_step(_die),
    "stop": _before_step(request_stop),
    "freeze": _before_step(_freeze),
    "write": _at_write,
    "commit": _at_commit,
    "full": _at_full_disk,
}
