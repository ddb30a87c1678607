"""The training data of one rank: packed sequences of its lanes, made ready in the background, and where they stand.

A step trains on one sequence of each lane over all ranks, so ``num_lanes`` is ``train.batch_size``; a rank of data
parallelism has some of them, and the ranks that share its sequences have the same ones.
"""

import hashlib
import json
import queue
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from longctx.errors import CheckpointError, ConfigError, DataError
from longctx.models.attention_spec import LandmarkSpec
from longctx.models.tokenizer import Tokenizer
from longctx.training.data.config import DataConfig
from longctx.training.data.documents import DocumentEncoder
from longctx.training.data.lane import Lane
from longctx.training.data.order import RowOrder
from longctx.training.data.packing import PackedSequence
from longctx.training.data.sources import RowSource, open_source

Batch = tuple[list[PackedSequence], dict[str, Any]]  # and the lanes' states after it
# What has to be the same for a state to mean the same rows: key of the state, and the option it comes from.
_IDENTITY = {
    "num_rows": "data.path",
    "rows": "data.path",
    "num_lanes": "train.batch_size",
    "context_length": "train.context_length",
    "shuffle": "data.shuffle",
    "seed": "data.seed",
    "long_rows": "data.long_rows",
    "block_size": "attention.block_size",  # None, and not in older states, without landmarks
}
_NUM_SAMPLED = 4  # rows that tell data from other data


class SequenceStream:
    """Endless batches of one sequence per lane of this rank. Use as a context manager, or ``close`` it.

    Args:
        config: what is read and how.
        tokenizer: the model's, with ``config.chat_template`` in use (``load_tokenizer(spec, config.chat_template)``).
        context_length: tokens of each sequence.
        num_lanes: sequences of a step over all ranks.
        lanes: this rank's.
        landmarks: that stand between the tokens of documents; None: none do.
        state: from ``state`` or ``merge_states``, of the same data and as many lanes: go on there.

    Raises:
        ConfigError: there is no data, or its format is not clear.
        CheckpointError: ``state`` is of other data or lacks a lane.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        num_lanes: int,
        lanes: range,
        landmarks: LandmarkSpec | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        assert lanes and lanes[0] >= 0 and lanes[-1] < num_lanes, f"lanes {lanes} of {num_lanes}"
        source = open_source(config.path, config)
        encoder = DocumentEncoder(config, tokenizer)
        order = RowOrder(num_rows=len(source), shuffle=config.shuffle, seed=config.seed)
        self._lanes = {
            str(lane_idx): Lane(
                source,
                order,
                encoder,
                config=config,
                context_length=context_length,
                first_row=lane_idx,
                num_lanes=num_lanes,
                landmarks=landmarks,
            )
            for lane_idx in lanes
        }
        rows = fingerprint(source)
        block_size = None if landmarks is None else landmarks.block_size
        shuffled = config.shuffle, config.seed
        values = (len(source), rows, num_lanes, context_length, *shuffled, config.long_rows, block_size)
        self._identity = dict(zip(_IDENTITY, values, strict=True))
        if state is not None:
            self._restore(state)
        self._handed_out = self._lane_states()
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._room = threading.Semaphore(max(1, config.prefetch // len(lanes)))  # batches that may be made ready
        self._ready: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._prepare, name="training data", daemon=True)
        self._thread.start()

    def next_batch(self) -> list[PackedSequence]:
        """One sequence of each of this rank's lanes, in their order; waits until they are ready.

        Raises what went wrong in the background: ``DataError`` for a row that cannot be used. It is raised when its
        turn comes, and from then on.
        """
        assert not self._closed.is_set(), "the stream is closed"
        if self._error is None:
            ready = self._ready.get()
            if not isinstance(ready, BaseException):
                batch, self._handed_out = ready
                self._room.release()
                return batch
            self._error = ready
        raise self._error

    def state(self) -> dict[str, Any]:
        """Where the stream stands after the batches that ``next_batch`` has returned, for JSON."""
        return self._identity | {"lanes": self._handed_out}

    @property
    def epoch(self) -> float:
        """How often the data has been read; the lane that is behind says so."""
        return min(lane["next_row"] for lane in self._handed_out.values()) / self._identity["num_rows"]

    @property
    def num_skipped(self) -> int:
        """Rows that this rank's lanes left out since the training began."""
        return sum(lane["num_skipped"] for lane in self._handed_out.values())

    def close(self) -> None:
        """End the background work; waits for the batch that is being made."""
        self._closed.set()
        self._room.release()
        self._thread.join()

    def __enter__(self) -> "SequenceStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _restore(self, state: dict[str, Any]) -> None:
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise CheckpointError(
                    f"the checkpoint's order of data is of {key}={state.get(key)}, now it is {value}: keep "
                    f"{_IDENTITY[key]}, or start anew with checkpoint.resume=never"
                )
        for lane_idx, lane in self._lanes.items():
            if lane_idx not in state["lanes"]:
                raise CheckpointError(f"the checkpoint does not say where lane {lane_idx} of the data stands")
            lane.restore(state["lanes"][lane_idx])

    def _lane_states(self) -> dict[str, Any]:
        return {lane_idx: lane.state() for lane_idx, lane in self._lanes.items()}

    def _prepare(self) -> None:
        """The background thread."""
        try:
            while True:
                self._room.acquire()
                batch = []
                for lane in self._lanes.values():
                    if self._closed.is_set():
                        return
                    sequence = lane.next_sequence()
                    assert sequence is not None, "a lane without a stop ended"
                    batch.append(sequence)
                self._ready.put((batch, self._lane_states()))
        except BaseException as error:  # noqa: BLE001 (next_batch raises it)
            self._ready.put(error)


def fingerprint(source: RowSource) -> str:
    """What tells these rows from others, wherever their files are: some of them, spread over all."""
    digest = hashlib.blake2b(digest_size=8)
    step = max(1, len(source) // _NUM_SAMPLED)
    for row_idx in range(0, len(source), step):
        try:
            row = source.read(row_idx)
        except DataError:
            row = {}
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One state of all ranks' lanes, for streams of any number of ranks; raises ``CheckpointError`` if they differ."""
    merged: dict[str, Any] = {}
    for state in states:
        lanes = merged.get("lanes", {}) | state["lanes"]
        identity = {key: value for key, value in state.items() if key != "lanes"}
        if merged and identity != {key: merged[key] for key in identity}:
            raise CheckpointError(f"ranks read different data: {identity} and {merged}")
        merged = identity | {"lanes": lanes}
    return merged


def read_eval_sequences(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    context_length: int,
    num_sequences: int,
    landmarks: LandmarkSpec | None = None,
) -> list[PackedSequence]:
    """The first sequences of ``config.eval_path``, in the order of its rows; fewer if there are no more rows.

    Raises ``ConfigError`` if there are none, and ``DataError`` for a bad row if those are fatal.
    """
    source = open_source(config.eval_path, config, option="data.eval_path")
    lane = Lane(
        source,
        RowOrder(num_rows=len(source), shuffle=False, seed=0),
        DocumentEncoder(config, tokenizer),
        config=config,
        context_length=context_length,
        first_row=0,
        num_lanes=1,
        stop=len(source),
        landmarks=landmarks,
    )
    sequences = []
    while len(sequences) < num_sequences and (sequence := lane.next_sequence()) is not None:
        sequences.append(sequence)
    if not sequences:
        raise ConfigError(f"data.eval_path={config.eval_path} has no row that can be evaluated on")
    return sequences
