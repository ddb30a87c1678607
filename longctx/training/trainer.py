"""One rank's training run: packed sequences in, weights, checkpoints and records out.

    for each step:  own lanes' sequences -> targets counted over all ranks
                    for each sequence: this rank's shard -> sum of losses / all targets -> backward
                    one all-reduce: loss, who has written its checkpoint, who was asked to stop
                    step -> record -> perhaps evaluation, checkpoint

Everything that ranks decide together comes out of sums that all of them have, so that they never disagree about what
is next. No Ray here: whoever starts ranks calls ``train_rank`` in each.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longctx.errors import TrainingError
from longctx.training.checkpoints import CheckpointReader, CheckpointWriter, describe_last_good
from longctx.training.conclusion import conclude_run
from longctx.training.config import TrainConfig
from longctx.training.data.packing import PackedSequence
from longctx.training.export import export_adapter, export_model
from longctx.training.output_lock import WRITER_NAME, lock_output
from longctx.training.peak import warn_of_slow_products
from longctx.training.place import RankPlace
from longctx.training.record import StepRecord
from longctx.training.run_parts import RunParts
from longctx.training.schedule import learning_rate
from longctx.training.step_log import open_step_log
from longctx.training.step_trace import trace_step
from longctx.training.stop import is_stop_requested

logger = logging.getLogger(__name__)

_WRITE_WAIT_S = 0.02
_OWNER_WAIT_S = 60.0  # for the rank 0 of a gang that was given up, on another node perhaps, to be gone


def train_rank(config: TrainConfig, place: RankPlace) -> dict[str, Any]:
    """Run one rank until the last step, or until any rank is asked to stop. Collective over all ranks of the run.

    Args:
        config: of the run; equal on all ranks.
        place: which rank this is.

    Returns:
        ``steps`` done, the last ``loss``, ``stopped`` early or not, and the folder ``final`` that was exported or None.

    Raises:
        TrainingError: if the loss is not a number.
        ConfigError, CheckpointError: for what cannot be trained.
    """
    with (
        nullcontext() if place.global_rank else lock_output(Path(config.output), name=WRITER_NAME, wait_s=_OWNER_WAIT_S)
    ):
        parts = RunParts(config, place)
        try:
            return TrainingRun(parts).train()
        finally:
            parts.close()


class TrainingRun:
    """The steps of one run on one rank; ``train`` makes them all."""

    def __init__(self, parts: RunParts) -> None:
        config = parts.config
        self._config, self._parts, self._world = config, parts, parts.world
        self._output = Path(config.output)
        self._step = self._saved_step = parts.first_step
        self._loss = parts.first_loss
        self._evaluated: float | None = None
        self._evaluated_step = -1
        self._sequences: Sequence[PackedSequence] = ()
        self._is_stopped = False
        self._failed_writes = 0
        self._writer = CheckpointWriter(
            self._output,
            rank=parts.world.rank,
            world_size=parts.world.world_size,
            asynchronous=config.checkpoint.asynchronous,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
        )

    def train(self) -> dict[str, Any]:
        """Every step that is left."""
        config = self._config
        if self._world.rank == 0:
            warn_of_slow_products(config.model.dtype, self._parts.device.type)
        log = open_step_log(
            config.logger,
            self._output,
            num_steps=config.train.num_steps,
            is_first=self._world.rank == 0,
            start_step=self._step,
        )
        if self._world.rank == 0 and self._step >= config.train.num_steps:
            logger.info("all %d steps (train.num_steps) are done", config.train.num_steps)
        try:
            while self._step < config.train.num_steps and not self._is_stopped:
                with trace_step(
                    self._step + 1, config.logger.trace_steps, self._output, global_rank=self._world.rank
                ) as folder:
                    self._parts.parallel.trace = folder
                    record = self.train_step()
                if self._is_due(config.train.eval_every):
                    self._evaluate()
                    record = dataclasses.replace(record, eval_loss=self._evaluated)
                log.write(record)
                if self._is_due(config.checkpoint.every):
                    self._begin_checkpoint()
            self._finish()
        finally:
            log.close()
        return self._conclude()

    def _is_due(self, every: int) -> bool:
        return every > 0 and self._step % every == 0

    def train_step(self) -> StepRecord:
        """The next optimizer step."""
        begun = time.perf_counter()
        parts, config = self._parts, self._config
        self._sequences = sequences = parts.stream.next_batch()
        num_targets = self._count_targets(sequences)
        lr = learning_rate(config.optimizer, self._step, config.train.num_steps)
        own_loss = 0.0
        for index, sequence in enumerate(sequences):
            lane = self._world.at.dp_rank * len(sequences) + index
            torch.manual_seed(hash((config.train.seed, self._step, lane, self._world.at.sp_rank)))  # of dropout
            loss = parts.loss(sequence, scale=1 / num_targets)
            parts.engine.backward(loss)
            own_loss += float(loss.detach())
        self._loss = self._agree(own_loss)
        norm = parts.engine.step(lr)
        if not math.isfinite(norm):
            self._fail(f"the gradients' norm is {norm}")
        self._step += 1
        return self._record(sequences, num_targets, lr, norm, time.perf_counter() - begun)

    def _count_targets(self, sequences: Sequence[PackedSequence]) -> int:
        own = sum(sequence.num_targets for sequence in sequences)
        (count,) = self._world.add_up([own if self._world.at.sp_rank == 0 else 0])
        if not count:
            rows = ", ".join(row for sequence in sequences for row in sequence.provenance[:3])
            raise TrainingError(f"step {self._step + 1}: no token counts in the loss; its rows begin with {rows}")
        return int(count)

    def _agree(self, own_loss: float) -> float:
        """The step's loss; ends a checkpoint that every rank has written, and learns whether to stop."""
        writer = self._writer
        told = [own_loss, float(writer.is_written), float(writer.has_failed), float(is_stop_requested())]
        loss, num_written, num_failed, num_stops = self._world.add_up(told)
        self._end_checkpoint(num_written, num_failed)
        self._is_stopped = num_stops > 0
        if not math.isfinite(loss):
            self._fail(f"the loss is {loss}", is_culprit=not math.isfinite(own_loss))
        return loss

    def _fail(self, problem: str, *, is_culprit: bool = True) -> None:
        """Raise with where the numbers came from, on every rank alike."""
        own = [row for sequence in self._sequences for row in sequence.provenance] if is_culprit else []
        all_rows: list[list[str]] = [[]] * self._world.world_size
        dist.all_gather_object(all_rows, own[:8])
        rows = list(dict.fromkeys(row for rank in all_rows for row in rank))
        self._settle()
        raise TrainingError(
            f"step {self._step + 1}: {problem}; rows of its sequences: {', '.join(rows)}; "
            + describe_last_good(self._output, self._step)
        )

    def _record(
        self, sequences: Sequence[PackedSequence], num_targets: int, lr: float, norm: float, seconds: float
    ) -> StepRecord:
        is_speaker = self._world.at.sp_rank == 0
        own = [
            float(sum(sequence.num_tokens for sequence in sequences)) if is_speaker else 0.0,
            float(sum(self._parts.count_flops(sequence) for sequence in sequences)) if is_speaker else 0.0,
            float(self._parts.stream.num_skipped) if is_speaker else 0.0,
        ]
        memory = [0.0] * self._world.world_size
        memory[self._world.rank] = float(self._parts.read_memory())
        num_tokens, flops, num_skipped, *memories = self._world.add_up(own + memory)
        return StepRecord(
            step=self._step,
            num_steps=self._config.train.num_steps,
            loss=self._loss,
            num_tokens=int(num_tokens),
            num_trained_tokens=num_targets,
            seconds=seconds,
            grad_norm=norm,
            lr=lr,
            memory_bytes=tuple(int(each) for each in memories),
            flops_share=flops / seconds / (self._parts.peak_flops * self._world.world_size),
            num_skipped_rows=int(num_skipped),
        )

    def _evaluate(self) -> None:
        """Mean loss over the evaluation's sequences, which the groups of ranks take in turns."""
        parts = self._parts
        sequences = parts.eval_sequences
        if not sequences or self._evaluated_step == self._step:
            return
        parts.engine.train(False)
        total, count = 0.0, 0
        dp_degree = self._config.parallel.dp_degree
        with torch.no_grad():
            for first in range(0, len(sequences), dp_degree):
                index = first + self._world.at.dp_rank
                sequence = sequences[min(index, len(sequences) - 1)]  # every rank has to call: ZeRO-3 gathers weights
                loss = float(parts.loss(sequence))
                if index < len(sequences):
                    total += loss
                    count += sequence.num_targets if self._world.at.sp_rank == 0 else 0
        parts.engine.train(True)
        loss, num_targets = self._world.add_up([total, float(count)])
        self._evaluated, self._evaluated_step = loss / num_targets, self._step

    def _begin_checkpoint(self) -> None:
        self._settle()
        if self._config.checkpoint.keep_best:
            self._evaluate()  # the best is to be told by one measure
        metric = self._loss if self._evaluated is None else self._evaluated
        state = {
            "step": self._step,
            "loss": self._loss,
            "eval_loss": self._evaluated,
            "metric": metric if math.isfinite(metric) else math.inf,
            "shapes": self._parts.shapes,
            "config": dataclasses.asdict(self._config),
        }
        data = self._parts.stream.state() if self._world.at.sp_rank == 0 else {}
        self._writer.begin(state, self._parts.engine.fragments(), data)
        self._saved_step = self._step

    def _settle(self) -> None:
        """Wait until a checkpoint that was begun is there, or given up, on all ranks."""
        while self._writer.is_busy:
            counts = self._world.add_up([float(self._writer.is_written), float(self._writer.has_failed)])
            if not self._end_checkpoint(*counts):
                time.sleep(_WRITE_WAIT_S)

    def _end_checkpoint(self, num_written: float, num_failed: float) -> bool:
        if not self._writer.is_busy or num_written + num_failed < self._world.world_size:
            return False
        path = self._writer.end(num_failed=int(num_failed))
        (is_there,) = self._world.add_up([float(path is not None) if self._world.rank == 0 else 0.0])
        if is_there:
            self._failed_writes = 0
            logger.info("checkpoint of step %d written", self._saved_step)
        else:
            self._failed_writes += 1
            self._saved_step = -1
        return True

    def _finish(self) -> None:
        """The last evaluation and checkpoint."""
        config = self._config
        if self._parts.eval_sequences and not self._is_due(config.train.eval_every) and not self._is_stopped:
            self._evaluate()
            if self._world.rank == 0:
                logger.info("evaluation loss %.4f", self._evaluated)
        self._settle()
        if self._saved_step != self._step:
            self._begin_checkpoint()
            self._settle()
        if self._failed_writes:
            raise TrainingError(
                f"the checkpoint of step {self._step} could not be written into {self._output}; "
                + describe_last_good(self._output, self._step)
            )

    def _conclude(self) -> dict[str, Any]:
        final: Path | None = None
        if self._world.rank == 0:
            wants_model = self._config.checkpoint.export and not self._is_stopped
            final = conclude_run(self._output, self._config, export=self._export if wants_model else None)
        return {
            "steps": self._step,
            "loss": self._loss,
            "eval_loss": self._evaluated,
            "stopped": self._is_stopped,
            "final": str(final) if final else None,
        }

    def _export(self, reader: CheckpointReader, folder: Path) -> Path:
        if self._parts.has_adapter:
            return export_adapter(reader, self._config, self._parts.parallel.model, folder)
        return export_model(reader, self._config, self._parts.spec, folder)
