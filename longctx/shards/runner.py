"""How ranks step together: rank 0 tells what is computed, all compute, rank 0 gets what is sampled from.

rank 0   schedule -> tell ----> compute <-> compute ----> gather rows -> output matrix -> sample
others               listen --> compute <-> compute ----> send rows
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from longctx.engine.rows import DecodeRows
from longctx.engine.scheduler import Chunk
from longctx.engine.sequence import Sequence
from longctx.models.packed import PackedDecoder
from longctx.shards.exports import RankExports
from longctx.shards.rank import ShardRank
from longctx.shards.step import Segment, Step, StepWriter
from memory.pages import PagePool
from memory.sharded_pages import ShardedPages
from parallel.carrier import ExchangeError
from parallel.gloo_group import GlooGroup

logger = logging.getLogger(__name__)

T = TypeVar("T")

END = b"end"  # instead of a step
IDLE = b""
SILENCES = 4  # idle messages in the time after which rank 0 counts as lost


class Rank(Protocol):
    """One rank's part: ``ShardRank``, or ``CoreRank`` under CCA attention."""

    decoder: PackedDecoder
    pool: PagePool
    rank: int
    exports: RankExports

    def make_reader(self) -> Any:
        """What reads the steps that rank 0 tells."""
        ...

    def compute(self, step: Any, on_layer: Callable[[int], None] | None = None) -> tuple[torch.Tensor, list[list[int]]]:
        """See ``ShardRank.compute``."""
        ...

    def close(self) -> None:
        """Nothing is computed any more."""
        ...


class GroupRunner(ABC):
    """Rank 0's runner, for ``longctx.engine.engine.Engine``.

    Args:
        rank: this rank's part.
        group: all ranks.
        timeout_s: after which a silent rank 0 counts as lost.
    """

    def __init__(self, rank: Rank, group: GlooGroup, timeout_s: float) -> None:
        self._rank, self._group = rank, group
        self.pool = rank.pool
        self._is_broken = False  # a step or a message failed: ranks may be anywhere in it
        self._idle_s, self._told_at = timeout_s / SILENCES, time.monotonic()

    def run(self, chunks: list[Chunk], on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """See ``ModelRunner.run``. Raises ``ExchangeError`` if a rank, this one too, fails, and from then on."""
        return self._guard(lambda: self._run(chunks, on_layer))

    def _guard(self, act: Callable[[], T]) -> T:
        """What ``act`` returns; if it fails, nothing is done with the other ranks any more."""
        if self._is_broken:
            raise ExchangeError("a rank of this worker was lost")
        self._is_broken = True
        try:
            result = act()
        except ExchangeError:
            raise
        except Exception as error:
            raise ExchangeError(f"rank 0 failed in a step: {str(error) or type(error).__name__}") from error
        self._is_broken = False
        return result

    @abstractmethod
    def _make_step(self, chunks: list[Chunk]) -> tuple[Any, bytes]:
        """The next step, for ``Rank.compute``, and as bytes for its reader."""

    def _run(self, chunks: list[Chunk], on_layer: Callable[[int], None] | None) -> torch.Tensor:
        step, data = self._make_step(chunks)
        self._tell(data)
        own, rows_of = self._rank.compute(step, on_layer)
        parts = self._group.gather_rows(own.cpu().contiguous(), [len(rows) for rows in rows_of])
        hidden = torch.cat(parts).to(own.device)
        order = np.argsort(np.concatenate([np.array(rows, dtype=np.int64) for rows in rows_of]))
        return self._rank.decoder.logits(hidden[torch.from_numpy(order).to(own.device)])

    def keep_alive(self) -> None:
        """Between steps, now and then: the other ranks hear that rank 0 lives."""
        if not self._is_broken and time.monotonic() - self._told_at > self._idle_s:
            self._is_broken = True
            self._tell(IDLE)
            self._is_broken = False

    def close(self) -> None:
        """Let the other ranks go."""
        try:
            if not self._is_broken:
                self._tell(END)
        except ExchangeError as error:
            logger.warning("%s", error)
        self._group.close()

    def _tell(self, data: bytes) -> None:
        self._group.tell(data)
        self._told_at = time.monotonic()


class ShardRunner(GroupRunner):
    """Of ranks that have pages of their own each.

    Args:
        rank, group, timeout_s: see the base class.
        pages: what rank 0 allocates.
        rows: the decoding sequences.
    """

    def __init__(
        self, rank: ShardRank, pages: ShardedPages, group: GlooGroup, timeout_s: float, rows: DecodeRows
    ) -> None:
        super().__init__(rank, group, timeout_s)
        self._pages, self._rows, self._writer = pages, rows, StepWriter()

    def _make_step(self, chunks: list[Chunk]) -> tuple[Step, bytes]:
        segments = [self._decode_segment(row, sequence) for row, sequence in enumerate(self._rows.sequences)]
        segments += [_chunk_segment(chunk) for chunk in chunks]
        step = self._take(tuple(segments), ())
        return step, self._writer.write(step)

    def run_errand(self, loads: tuple[tuple[int, bytes], ...] = ()) -> list[list[int]]:
        """Have all that waits for the next step done now, and pages loaded; see ``ShardRank.compute`` for each row."""

        def run() -> list[list[int]]:
            step = self._take((), loads)
            self._tell(self._writer.write(step))
            own, rows_of = self._rank.compute(step)
            return torch.cat(self._group.gather_rows(own, list(map(len, rows_of)))).tolist()

        return self._guard(run)

    def keep_alive(self) -> None:
        """See the base class; pages that are to be saved do not wait for the next request."""
        if self._pages.has_saves and not self._is_broken:
            self.run_errand()
        super().keep_alive()

    def close(self) -> None:
        """See the base class."""
        try:
            self.keep_alive()
        except ExchangeError as error:
            logger.warning("%s", error)
        super().close()

    def _take(self, segments: tuple[Segment, ...], loads: tuple[tuple[int, bytes], ...]) -> Step:
        pages = self._pages
        copies, arrived, saves = pages.take_copies(), pages.take_arrived(), pages.take_saves()
        return Step(segments, tuple(copies), tuple(arrived), tuple(saves), loads)

    def _decode_segment(self, row: int, sequence: Sequence) -> Segment:
        start = int(self._rows.positions[row])
        return Segment(
            _key(sequence),
            start,
            start + 1,
            True,
            0,
            "",
            self._rows.input_ids[row : row + 1],
            self._rows.tables[row, : len(sequence.pages)],
        )


def follow(rank: Rank, group: GlooGroup, *, timeout_s: float) -> None:
    """Another rank's life: compute what rank 0 tells, until it says end. Raises ``ExchangeError`` if a rank is lost."""
    torch.set_num_threads(torch.get_num_threads())  # OpenMP's own count belongs to a thread: oneDNN asks for that
    reader = rank.make_reader()
    while True:
        data = group.listen(timeout_s)
        if data == END:
            return
        if data == IDLE:
            continue
        step = reader.read(data)
        own, rows_of = rank.compute(step, rank.exports.begin(step))
        group.gather_rows(own.cpu().contiguous(), [len(rows) for rows in rows_of])
        rank.exports.end(step)


def follow_on_thread(
    rank: Rank, group: GlooGroup, *, timeout_s: float, on_end: Callable[[str], None], name: str
) -> threading.Thread:
    """``follow`` on a thread of its own; ``on_end`` gets the reason it ended, empty if rank 0 said so."""

    def run() -> None:
        reason = ""
        try:
            follow(rank, group, timeout_s=timeout_s)
        except Exception as error:  # whatever it is, this rank is of no more use, and somebody is told
            logger.exception("rank %d", rank.rank)
            reason = str(error) or type(error).__name__
        try:
            group.close()
        finally:
            on_end(reason)
            rank.close()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def _chunk_segment(chunk: Chunk) -> Segment:
    sequence = chunk.sequence
    export = sequence.active.request_id if sequence.active.export is not None else ""
    return Segment(
        _key(sequence),
        chunk.start,
        chunk.stop,
        chunk.is_last,
        sequence.rope_floor,
        export,
        sequence.token_ids(chunk.start, chunk.stop),
        np.array(sequence.pages, dtype=np.int32),
    )


def _key(sequence: Sequence) -> int:
    arrival, index = sequence.key
    return arrival << 16 | index
