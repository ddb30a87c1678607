"""Checkpoints of a run: each rank writes what lies on it, in the background; a checkpoint is there as a whole or not.

    output/checkpoints/step-00000100/
        rank-0000.safetensors   fragments: "master:NAME:START", "exp_avg:NAME:START", "exp_avg_sq:NAME:START", float32
        rank-0000.json          where this rank's data goes on
        state.json              step, losses, names and shapes; written last

All is written into a hidden folder first, which rank 0 renames when every rank's file is on the disk; so a crash or a
full disk never spoils an earlier checkpoint. Ranks on several machines need one file system. Fragments of all ranks
together are every trained weight once, so any number of ranks and any ZeRO stage can go on from them.
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longctx.errors import CheckpointError
from longctx.training.deepspeed_engine import Fragment

logger = logging.getLogger(__name__)

FOLDER, STATE_FILE = "checkpoints", "state.json"
VERSION = 1  # of the layout above
_IDLE, _WRITING, _WRITTEN, _FAILED = "idle", "writing", "written", "failed"


class CheckpointWriter:
    """One rank's hand in the run's checkpoints.

    ``begin`` copies and starts to write; ranks tell each other ``is_written`` and ``has_failed``; when every rank has
    said one of the two, all call ``end``.

    Args:
        output: the run's folder.
        rank, world_size: of this process.
        asynchronous: write in a thread.
        keep_last, keep_best: newest and best checkpoints that are kept; best is the lowest ``metric``.
    """

    def __init__(
        self, output: Path, *, rank: int, world_size: int, asynchronous: bool, keep_last: int, keep_best: int
    ) -> None:
        self._folder = output / FOLDER
        self._rank, self._world_size, self._asynchronous = rank, world_size, asynchronous
        self._keep_last, self._keep_best = keep_last, keep_best
        self._status, self._error = _IDLE, ""
        self._state: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        if rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in self._folder.glob(".*.partial"):
                shutil.rmtree(left, ignore_errors=True)  # of a run that was killed

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint was begun and not ended."""
        return self._status != _IDLE

    @property
    def is_written(self) -> bool:
        """Whether this rank's part is on the disk."""
        return self._status == _WRITTEN

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part could not be written."""
        return self._status == _FAILED

    def begin(self, state: dict[str, Any], fragments: Iterable[Fragment], data: dict[str, Any]) -> None:
        """Start a checkpoint.

        Args:
            state: what ``state.json`` holds, with ``step`` and ``metric``; equal on all ranks.
            fragments: this rank's; copied before this returns.
            data: where this rank's data goes on.
        """
        assert self._status == _IDLE, "the checkpoint before was not ended"
        tensors = {
            f"{part}:{each.name}:{each.start}": tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            for each in fragments
            for part, tensor in (("master", each.master), *each.moments.items())
        }
        self._state, self._status = state, _WRITING
        if not self._asynchronous:
            self._write(tensors, data)
            return
        self._thread = threading.Thread(target=self._write, args=(tensors, data), name="checkpoint", daemon=True)
        self._thread.start()

    def end(self, *, num_failed: int) -> Path | None:
        """Rank 0 makes the checkpoint count, or gives it up; returns its folder, or None where it was given up."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        final, error = self._final(self._state["step"]), self._error
        self._status, self._error = _IDLE, ""
        if num_failed:
            if self._rank == 0:
                shutil.rmtree(self._partial(self._state["step"]), ignore_errors=True)
            if error:
                logger.error("checkpoint of step %d was not written: %s", self._state["step"], error)
            return None
        if self._rank == 0:
            try:
                self._commit(final)
            except OSError as problem:
                logger.error("checkpoint of step %d was not written: %s", self._state["step"], problem)
                shutil.rmtree(self._partial(self._state["step"]), ignore_errors=True)
                return None
            try:
                self._prune()
            except (OSError, CheckpointError) as problem:
                logger.warning("old checkpoints could not be removed: %s", problem)
        return final

    def _write(self, tensors: dict[str, torch.Tensor], data: dict[str, Any]) -> None:
        folder = self._partial(self._state["step"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"rank-{self._rank:04d}.safetensors"
            save_file(tensors, path)
            _flush(path)
            _write_json(folder / f"rank-{self._rank:04d}.json", data)
        except Exception as error:  # noqa: BLE001 - in a thread, whatever it is: ranks wait for the status
            self._error, self._status = f"{folder}: {error}", _FAILED
        else:
            self._status = _WRITTEN

    def _commit(self, final: Path) -> None:
        partial = self._partial(self._state["step"])
        for rank in range(self._world_size):
            if not (partial / f"rank-{rank:04d}.safetensors").is_file():
                raise FileNotFoundError(
                    f"rank {rank} has not written into {self._folder}: is it on another file system?"
                )
        _write_json(partial / STATE_FILE, self._state | {"version": VERSION, "world_size": self._world_size})
        _flush(partial)
        if final.exists():
            shutil.rmtree(final)  # of a run that went on from an earlier one
        partial.rename(final)
        _flush(self._folder)

    def _prune(self) -> None:
        found = list_checkpoints(self._folder.parent)
        kept = {*found[-self._keep_last :], *rank_checkpoints(self._folder.parent)[: self._keep_best]}
        for path in found:
            if path not in kept:
                hidden = path.with_name(f".{path.name}.partial")
                path.rename(hidden)  # a reader finds it whole or not at all
                shutil.rmtree(hidden, ignore_errors=True)

    def _partial(self, step: int) -> Path:
        return self._folder / f".{name_checkpoint(step)}.partial"

    def _final(self, step: int) -> Path:
        return self._folder / name_checkpoint(step)


class CheckpointReader:
    """Any rank's view of one checkpoint, whatever ranks wrote it.

    Args:
        folder: ``output/checkpoints/step-N``.

    Raises:
        CheckpointError: if a file is missing, torn or of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = _read_json(folder / STATE_FILE)
        if self.state.get("version") != VERSION:
            raise CheckpointError(f"{folder}: version {self.state.get('version')} is not {VERSION}")
        self._pieces: dict[tuple[str, str], list[tuple[int, Path, str]]] = {}
        for rank in range(self.state["world_size"]):
            self._index(folder / f"rank-{rank:04d}.safetensors")
        self.data = [_read_json(folder / f"rank-{rank:04d}.json") for rank in range(self.state["world_size"])]

    def read(self, name: str, part: str, start: int, numel: int) -> torch.Tensor:
        """Elements ``[start, start + numel)`` of a flattened weight, or of one of its moments, float32.

        Args:
            name: of the weight.
            part: ``"master"`` or one of ``MOMENTS``.
            start, numel: which elements.
        """
        whole = torch.empty(numel)
        done = 0
        for first, path, key in self._pieces.get((part, name), ()):
            with safe_open(path, framework="pt") as file:
                piece = file.get_slice(key)
                (size,) = piece.get_shape()
                low, high = max(start, first), min(start + numel, first + size)
                if low < high:
                    whole[low - start : high - start] = piece[low - first : high - first]
                    done += high - low
        if done != numel:
            raise CheckpointError(f"{self.folder}: {part} of {name} has {done} of {numel} elements")
        return whole

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    part, _, rest = key.partition(":")
                    name, _, start = rest.rpartition(":")
                    self._pieces.setdefault((part, name), []).append((int(start), path, key))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None


def name_checkpoint(step: int) -> str:
    """The folder's; in the order of steps."""
    return f"step-{step:08d}"


def list_checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints of a run, the oldest first."""
    return sorted(path for path in (output / FOLDER).glob("step-*") if (path / STATE_FILE).is_file())


def rank_checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints of a run, the one of the lowest ``metric`` first."""
    return sorted(list_checkpoints(output), key=lambda path: _read_json(path / STATE_FILE)["metric"])


def describe_last_good(output: Path, num_steps: int) -> str:
    """The newest checkpoint from before what the weights became after ``num_steps`` steps, for error messages."""
    found = list_checkpoints(output)
    good = [path for path in found if path.name < name_checkpoint(num_steps)]
    told = f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint before"
    return told + ("" if good == found else f"; {found[-1].name} has the weights that it happened with")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _flush(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _flush(path: Path) -> None:
    """To the disk itself: a rename must not get there before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
