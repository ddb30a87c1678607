"""JSON lines: one object a line. Files are scanned once for the places of their lines; blank lines are no rows."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from longctx.errors import ConfigError, DataError
from longctx.training.data.config import DataConfig
from longctx.training.data.sources import locate

SCAN_BYTES = 1 << 24
_NEWLINE = ord("\n")


class JsonLines:
    """Rows of JSON lines files.

    Args:
        files: in the order of rows.
        config: unused; every key of a row is read.

    Raises:
        ConfigError: a file cannot be read, or is no JSON lines file.
    """

    def __init__(self, files: list[Path], config: DataConfig) -> None:
        self._files = files
        self._indices = [_index(file) for file in files]
        self._first_rows = [0, *accumulate(len(line_idxs) for _, line_idxs in self._indices)]

    def __len__(self) -> int:
        return self._first_rows[-1]

    def place(self, row_idx: int) -> str:
        file_idx, local_row_idx = locate(self._first_rows, row_idx)
        return f"{self._files[file_idx]}:{self._indices[file_idx][1][local_row_idx] + 1}"

    def read(self, row_idx: int) -> dict[str, Any]:
        file_idx, local_row_idx = locate(self._first_rows, row_idx)
        bounds, line_idxs = self._indices[file_idx]
        line_idx = line_idxs[local_row_idx]
        start, stop = int(bounds[line_idx]), int(bounds[line_idx + 1])
        try:
            with self._files[file_idx].open("rb", buffering=0) as file:
                file.seek(start)
                row = json.loads(file.read(stop - start).decode("utf-8-sig").rstrip())
        except OSError as error:
            raise DataError(f"{self.place(row_idx)}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{self.place(row_idx)}: not UTF-8 text at byte {error.start}") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{self.place(row_idx)}: not JSON: {error.msg} at character {error.pos + 1}") from None
        except RecursionError:
            raise DataError(f"{self.place(row_idx)}: nested too deeply") from None
        if not isinstance(row, dict):
            raise DataError(f"{self.place(row_idx)}: a JSON object is needed, not {type(row).__name__}")
        return row


def _index(file: Path) -> tuple[np.ndarray, Any]:
    """Where lines begin, ``[num_lines + 1]`` with the end of the file; and the lines that are not blank, by index."""
    size, newlines = 0, []
    try:
        with file.open("rb") as opened:
            _refuse_array(file, opened.read(SCAN_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()[:1])
            opened.seek(0)
            while chunk := opened.read(SCAN_BYTES):
                newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == _NEWLINE) + size)
                size += len(chunk)
            bounds = np.concatenate([[0], *(found + 1 for found in newlines)]).astype(np.int64)
            if bounds[-1] != size:  # the last line has no newline
                bounds = np.append(bounds, size)
            blank = []
            for line_idx in np.flatnonzero(np.diff(bounds) <= 2):  # a newline, alone or after a carriage return
                opened.seek(bounds[line_idx])
                if not opened.read(int(bounds[line_idx + 1] - bounds[line_idx])).strip():
                    blank.append(line_idx)
    except OSError as error:
        raise ConfigError(f"{file}: the data cannot be read: {error.strerror}") from None
    num_lines = len(bounds) - 1
    return bounds, np.delete(np.arange(num_lines), blank) if blank else range(num_lines)


def _refuse_array(file: Path, first: bytes) -> None:
    if first == b"[":
        raise ConfigError(f"{file}: this is one JSON array; write one object a line instead (jq -c '.[]')")
