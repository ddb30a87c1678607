"""One of a training step's sequences, step after step: every ``num_lanes``-th row of the endless order, packed.

A lane depends on nothing but the data, its number and how many lanes there are; ranks own lanes, so that the same data
is trained on whatever their number is. Where a lane stands is said by row numbers alone: the next one to read, and
those that were read and wait to be packed.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from longctx.errors import DataError
from longctx.models.attention_spec import LandmarkSpec
from longctx.training.data.config import DataConfig
from longctx.training.data.documents import Document, DocumentEncoder, Rendered, has_target
from longctx.training.data.order import RowOrder
from longctx.training.data.packing import PackedSequence, Piece, count_places, count_room, pack, take_piece
from longctx.training.data.sources import RowSource

logger = logging.getLogger(__name__)

MAX_WAITING = 64  # documents that are read ahead to find those that fit
WAITING_TOKENS = 1 << 15  # that are read ahead at most,
WAITING_CONTEXTS = 2  # or these sequences', if they are more
CHUNK_ROWS = 32  # are encoded together
CHUNK_CHARACTERS = 1 << 16
SKIPPED_EPOCHS = 8  # of rows may be skipped one after another; a lane of a shuffled order may miss the good ones
SHOWN_PROBLEMS = 10  # of a lane, in the log


class Lane:
    """Sequences of one lane.

    Args:
        source: the rows.
        order: of the rows.
        encoder: makes documents of rows.
        config: what is done with bad rows and long ones.
        context_length: tokens of a sequence.
        first_row: the lane's number; ``num_lanes`` further is its next row.
        num_lanes: of all ranks.
        stop: the row number that ends the lane; None: it never ends.
        landmarks: that stand between the tokens of documents; None: none do.
    """

    def __init__(
        self,
        source: RowSource,
        order: RowOrder,
        encoder: DocumentEncoder,
        *,
        config: DataConfig,
        context_length: int,
        first_row: int,
        num_lanes: int,
        stop: int | None = None,
        landmarks: LandmarkSpec | None = None,
    ) -> None:
        self._source, self._order, self._encoder, self._config = source, order, encoder, config
        self._context_length, self._landmarks = context_length, landmarks
        self._room = count_room(context_length, landmarks)  # for one document's tokens
        self._num_lanes, self._stop = num_lanes, stop
        self._next_row = first_row
        self._num_skipped = 0
        self._waiting: list[Piece] = []
        self._num_skipped_together = 0  # since the last good row
        self._rows = self._read(first_row)

    def next_sequence(self) -> PackedSequence | None:
        """The next sequence; None at the end.

        Raises ``DataError`` for a row that cannot be used, if such rows are fatal, or if none can be used.
        """
        pieces: list[Piece] = []
        space = self._context_length
        while (room := count_room(space, self._landmarks)) and (self._config.packing or not pieces):
            self._read_ahead()
            piece = take_piece(self._waiting, room, oldest=not pieces) if self._waiting else None
            if piece is None:
                break
            if has_target(piece.labels):
                pieces.append(piece)
                space -= count_places(piece.num_tokens, self._landmarks)
        if not pieces:
            return None
        return pack(pieces, self._context_length, padding_id=self._encoder.end_id, landmarks=self._landmarks)

    def state(self) -> dict[str, Any]:
        """Where the lane stands, for JSON."""
        waiting = [[piece.row_number, piece.start] for piece in self._waiting]
        return {"next_row": self._next_row, "waiting": waiting, "num_skipped": self._num_skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a lane of the same number stood that ``state`` is of."""
        self._next_row, self._num_skipped = state["next_row"], state["num_skipped"]
        self._rows = self._read(self._next_row)
        row_numbers = [row_number for row_number, _ in state["waiting"]]
        documents = self._encode([self._render(row_number) for row_number in row_numbers])
        self._waiting = []
        for (row_number, start), document in zip(state["waiting"], documents, strict=True):
            if isinstance(document, DataError):
                raise document
            document = self._fit(document)
            assert document is not None, f"row {row_number} waits, but is too long"
            self._waiting.append(Piece(row_number, document, start, len(document.ids)))

    def _read_ahead(self) -> None:
        """Read rows until enough wait to choose from."""
        max_waiting = MAX_WAITING if self._config.packing else 1
        max_tokens = max(WAITING_TOKENS, WAITING_CONTEXTS * self._context_length)
        num_tokens = sum(piece.num_tokens for piece in self._waiting)
        while len(self._waiting) < max_waiting and num_tokens < max_tokens:
            row = next(self._rows, None)
            if row is None:
                return
            row_number, document = row
            self._next_row = row_number + self._num_lanes
            if isinstance(document, DataError):
                self._skip(document, self._config.bad_rows)
                continue
            fitted = self._fit(document)
            if fitted is None:
                self._skip(self._explain_length(document), self._config.long_rows)
                continue
            self._num_skipped_together = 0
            self._waiting.append(Piece(row_number, fitted, 0, len(fitted.ids)))
            num_tokens += len(fitted.ids)

    def _fit(self, document: Document) -> Document | None:
        """The document as ``long_rows`` leaves it; None if it is not to be trained on."""
        length = self._room
        if self._config.long_rows == "split":
            return document
        document = replace(document, divisible=False)
        if len(document.ids) <= length:
            return document
        beginning = replace(document, ids=document.ids[:length], labels=document.labels[:length])
        return beginning if self._config.long_rows == "truncate" and has_target(beginning.labels) else None

    def _explain_length(self, document: Document) -> DataError:
        what = "has nothing to train on in its beginning" if self._config.long_rows == "truncate" else "is too long"
        room = "" if self._landmarks is None else f", which with landmarks has room for {self._room}"
        return DataError(
            f"{document.place}: the row {what}: {len(document.ids)} tokens, train.context_length={self._context_length}"
            f"{room} (data.long_rows says what is done with it)"
        )

    def _skip(self, problem: DataError, policy: str) -> None:
        """Count a row that is left out, or fail, as ``policy`` (an option's value) says."""
        if policy == "fail":
            raise problem
        self._num_skipped += 1
        if self._num_skipped <= SHOWN_PROBLEMS:
            last = ", further ones are only counted" if self._num_skipped == SHOWN_PROBLEMS else ""
            logger.warning("skipped: %s%s", problem, last)
        self._num_skipped_together += 1
        if self._num_skipped_together > SKIPPED_EPOCHS * self._order.num_rows:
            raise DataError(f"no row can be trained on; {self._num_skipped_together} were skipped, lastly: {problem}")

    def _read(self, first_row: int) -> Iterator[tuple[int, Document | DataError]]:
        """The lane's rows from ``first_row`` on, each with its number; several are encoded at a time."""
        row_number = first_row
        while self._stop is None or row_number < self._stop:
            row_numbers, rows, num_characters = [], [], 0
            while (
                len(rows) < CHUNK_ROWS
                and num_characters < CHUNK_CHARACTERS
                and (self._stop is None or row_number < self._stop)
            ):
                rows.append(self._render(row_number))
                num_characters += len(rows[-1].text) if isinstance(rows[-1], Rendered) else 0
                row_numbers.append(row_number)
                row_number += self._num_lanes
            yield from zip(row_numbers, self._encode(rows), strict=True)

    def _render(self, row_number: int) -> Rendered | Document | DataError:
        row_idx = self._order.row_idx(row_number)
        try:
            return self._encoder.render(self._source.place(row_idx), self._source.read(row_idx))
        except DataError as error:
            return error

    def _encode(self, rows: Sequence[Rendered | Document | DataError]) -> list[Document | DataError]:
        encoded = iter(self._encoder.encode([row for row in rows if isinstance(row, Rendered)]))
        return [next(encoded) if isinstance(row, Rendered) else row for row in rows]
