"""The decoding sequences under CCA attention: tables of the nearest tokens' pages, and of cores' pages beside them.

A table row of tokens begins with the first page that its sequence still has; ``num_passed`` pages went before it.
"""

import numpy as np
import numpy.typing as npt

from longctx.engine.rows import DecodeRows
from longctx.engine.sequence import Int64Array, Sequence


class CoreRows(DecodeRows):
    """As ``DecodeRows``, with what CCA needs by row.

    Args:
        num_rows, num_tokens, num_table_pages, page_size: as there.
        core_stride: as in ``CoreCapacity``.
    """

    def __init__(
        self, *, num_rows: int, num_tokens: int, num_table_pages: int, page_size: int, core_stride: int = 1
    ) -> None:
        super().__init__(num_rows=num_rows, num_tokens=num_tokens, num_table_pages=num_table_pages, page_size=page_size)
        self.core_stride = core_stride
        self.core_tables = np.zeros((num_rows, core_stride * self.tables.shape[1]), dtype=self.tables.dtype)
        self.group_sizes = np.ones(num_rows, dtype=np.int64)
        self.windows = np.ones(num_rows, dtype=np.int64)
        self.num_passed = np.zeros(num_rows, dtype=np.int64)  # pages of tokens that are no longer held

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        self._lay_cores(sequence, sequence.row)

    def remove(self, sequence: Sequence) -> None:
        row = sequence.row
        super().remove(sequence)
        if row < len(self.sequences):
            self._lay_cores(self.sequences[row], row)

    def at_change(self) -> list[Sequence]:
        """Sequences whose next token begins a page, ends a group whose core begins one, or no longer sees a page."""
        rows = slice(len(self.sequences))
        position, group_size = self.positions[rows], self.group_sizes[rows]
        first_page = first_tokens(position, group_size, self.windows[rows]) // self.page_size
        core_idx, rest = np.divmod(position + 1, group_size)
        is_core = (rest == 0) & ((core_idx - 1) % self.page_size == 0)
        changed = is_core | (position % self.page_size == 0) | (first_page > self.num_passed[rows])
        return [self.sequences[row] for row in np.flatnonzero(changed).tolist()]

    def num_passing(self, sequence: Sequence) -> int:
        """How many of its pages no coming token sees."""
        cores = sequence.cores
        assert cores is not None
        first_page = cores.sizes.first_token(int(self.positions[sequence.row])) // self.page_size
        return max(0, first_page - cores.num_passed)

    def pass_pages(self, sequence: Sequence, count: int) -> list[int]:
        """Take the first pages out; returns them."""
        cores, row = sequence.cores, sequence.row
        assert cores is not None
        passed, sequence.pages = sequence.pages[:count], sequence.pages[count:]
        cores.num_passed += count
        self.num_passed[row] = cores.num_passed
        self.tables[row, : len(sequence.pages)] = sequence.pages
        return passed

    def lacks_page(self, sequence: Sequence) -> bool:
        """Whether the next token has no place."""
        assert sequence.cores is not None
        return self.positions[sequence.row] // self.page_size - sequence.cores.num_passed >= len(sequence.pages)

    def lacks_core_page(self, sequence: Sequence) -> bool:
        """Whether the next token ends a group whose core has no place."""
        cores = sequence.cores
        assert cores is not None
        num_cores = cores.sizes.num_cores(int(self.positions[sequence.row]) + 1)
        return num_cores > len(cores.cores) // self.core_stride * self.page_size

    def add_core_page(self, sequence: Sequence, page: int) -> None:
        """Append a page for cores, or for bounds, to a sequence and its row."""
        assert sequence.cores is not None
        self.core_tables[sequence.row, len(sequence.cores.cores)] = page
        sequence.cores.cores.append(page)

    def locate_tokens(self) -> None:
        count = len(self.sequences)
        rows, positions = np.arange(count), self.positions[:count]
        self.slots[:count] = locate_entries(self.tables, rows, positions, self.page_size, self.num_passed)

    def lay_chunk(
        self, sequence: Sequence, start: int, stop: int, *, row: int, first_token: int
    ) -> npt.NDArray[np.int64]:
        last_token = first_token + stop - start
        self.input_ids[first_token:last_token] = sequence.token_ids(start, stop)
        positions = self.positions[first_token:last_token]
        positions[:] = np.arange(start, stop)
        self.kv_lens[row] = stop
        self.tables[row, : len(sequence.pages)] = sequence.pages
        self._lay_cores(sequence, row)
        rows = np.full(stop - start, row)
        slots = locate_entries(self.tables, rows, positions, self.page_size, self.num_passed)
        self.slots[first_token:last_token] = slots
        return positions

    def _lay_cores(self, sequence: Sequence, row: int) -> None:
        cores = sequence.cores
        assert cores is not None
        self.core_tables[row, : len(cores.cores)] = cores.cores
        self.group_sizes[row], self.windows[row] = cores.sizes.group_size, cores.sizes.window
        self.num_passed[row] = cores.num_passed


def locate_entries(
    tables: npt.NDArray[np.int32],
    rows: Int64Array,
    idx: Int64Array,
    page_size: int,
    num_passed: Int64Array | None = None,
) -> Int64Array:
    """Slots of tokens or cores by their number in the sequence.

    Args:
        tables: pages of each sequence, one row each.
        rows, idx: which sequence's, and which; of one shape.
        page_size: entries of a page.
        num_passed: pages of each sequence that its row does not have; None: it has all.
    """
    page_idx, offset = np.divmod(idx, page_size)
    if num_passed is not None:
        page_idx = page_idx - num_passed[rows]
    return tables[rows, page_idx] * np.int64(page_size) + offset


def first_tokens(positions: Int64Array, group_sizes: Int64Array, windows: Int64Array) -> Int64Array:
    """``CoreSizes.first_token`` of arrays."""
    return np.maximum(0, (positions + 1 - windows) // group_sizes) * group_sizes
