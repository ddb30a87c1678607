"""The decoding sequences, as rows of arrays that persist from step to step.

Row ``i`` of every array belongs to ``sequences[i]``. A decode step needs a handful of array operations whatever the
batch: tokens in, positions plus one, a page appended to the few rows that begin one. Entries behind the last row are
scratch, where the runner lays the step's prompt chunks down behind the decode rows.
"""

import numpy as np
import numpy.typing as npt

from longctx.engine.sequence import Sequence


class DecodeRows:
    """Host-side inputs of the next step.

    Args:
        num_rows: rows, decoding sequences and prompt chunks together.
        num_tokens: tokens of one step at most.
        num_table_pages: pages of the longest sequence.
        page_size: tokens per page.
    """

    def __init__(self, *, num_rows: int, num_tokens: int, num_table_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.sequences: list[Sequence] = []
        self.input_ids = np.zeros(num_tokens, dtype=np.int64)
        self.positions = np.zeros(num_tokens, dtype=np.int64)
        self.slots = np.zeros(num_tokens, dtype=np.int64)
        self.kv_lens = np.zeros(num_rows, dtype=np.int32)
        self.tables = np.zeros((num_rows, num_table_pages), dtype=np.int32)

    def add(self, sequence: Sequence) -> None:
        """Append a sequence all of whose tokens but the last are computed."""
        row = sequence.row = len(self.sequences)
        self.sequences.append(sequence)
        self.input_ids[row] = sequence.outputs[-1]
        self.positions[row] = sequence.num_computed
        self.kv_lens[row] = sequence.num_computed + 1
        self.tables[row, : len(sequence.pages)] = sequence.pages

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out; the last row moves into its place."""
        row, last = sequence.row, len(self.sequences) - 1
        moved = self.sequences.pop()
        sequence.row = -1
        if row != last:
            self.sequences[row] = moved
            moved.row = row
            for array in (self.input_ids, self.positions, self.kv_lens):
                array[row] = array[last]
            self.tables[row, : len(moved.pages)] = moved.pages

    def advance(self, token_ids: list[int]) -> None:
        """After a step: each row's sampled token is its next input."""
        count = len(token_ids)
        self.input_ids[:count] = token_ids
        self.positions[:count] += 1
        self.kv_lens[:count] += 1

    def at_page_start(self) -> list[Sequence]:
        """Sequences whose next token needs a page they do not have."""
        rows = np.flatnonzero(self.positions[: len(self.sequences)] % self.page_size == 0)
        starting = (self.sequences[row] for row in rows.tolist())
        return [s for s in starting if len(s.pages) * self.page_size <= self.positions[s.row]]

    def add_page(self, sequence: Sequence, page: int) -> None:
        """Append a page to a sequence and its row."""
        self.tables[sequence.row, len(sequence.pages)] = page
        sequence.pages.append(page)

    def locate_tokens(self) -> None:
        """Set ``slots`` of the decode rows from their positions and tables."""
        count = len(self.sequences)
        page_idx, offset = np.divmod(self.positions[:count], self.page_size)
        self.slots[:count] = self.tables[np.arange(count), page_idx] * np.int64(self.page_size) + offset

    def lay_chunk(
        self, sequence: Sequence, start: int, stop: int, *, row: int, first_token: int
    ) -> npt.NDArray[np.int64]:
        """Write tokens ``start`` to ``stop`` of a sequence behind the decode rows; returns the view of their positions.

        Args:
            row: where its length and table go.
            first_token: where its tokens go.
        """
        size, last_token = self.page_size, first_token + stop - start
        self.input_ids[first_token:last_token] = sequence.token_ids(start, stop)
        positions = self.positions[first_token:last_token]
        positions[:] = np.arange(start, stop)
        pages = np.array(sequence.pages, dtype=np.int32)
        self.slots[first_token:last_token] = pages[positions // size] * np.int64(size) + positions % size
        self.kv_lens[row] = stop
        self.tables[row, : len(pages)] = pages
        return positions
