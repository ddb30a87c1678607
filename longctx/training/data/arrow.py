"""Rows that lie in Arrow files, mapped into memory: folders that ``datasets`` saved, and Parquet files.

A row group of Parquet is decoded as a whole, so rows in random order would decode a group for each row. ``datasets``
therefore converts the files once, into its cache (``HF_DATASETS_CACHE``), which the ranks of a machine share; only the
columns that are trained on are converted.
"""

from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import datasets.exceptions
import pyarrow
import pyarrow.parquet

from longctx.errors import ConfigError, DataError
from longctx.training.data.config import DataConfig
from longctx.training.data.sources import locate


class ArrowRows:
    """Rows of data sets that follow each other.

    Args:
        rows: all of them.
        files: what a user knows them by.
        first_rows: ``[num_files + 1]``, the number of each file's first row, and of all rows.
    """

    def __init__(self, rows: datasets.Dataset, *, files: list[Path], first_rows: list[int]) -> None:
        self._rows, self._files, self._first_rows = rows, files, first_rows

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, row_idx: int) -> str:
        file_idx, local_row_idx = locate(self._first_rows, row_idx)
        return f"{self._files[file_idx]}#{local_row_idx}"

    def read(self, row_idx: int) -> dict[str, Any]:
        try:
            return self._rows[row_idx]
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{self.place(row_idx)}: cannot be read: {error}") from None


def open_parquet(files: list[Path], config: DataConfig) -> ArrowRows:
    """Rows of Parquet files; raises ``ConfigError`` if one cannot be read or they do not go together."""
    num_rows, columns = [], []
    for file in files:
        try:
            metadata = pyarrow.parquet.read_metadata(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise ConfigError(f"{file}: not a Parquet file that can be read: {error}") from None
        columns = columns or _choose_columns(file, list(metadata.schema.to_arrow_schema().names), config)
        num_rows.append(metadata.num_rows)
    datasets.disable_progress_bars()
    try:
        rows = datasets.Dataset.from_parquet([str(file) for file in files], columns=columns)
    except (datasets.exceptions.DatasetsError, ValueError, TypeError) as error:
        reason = error.__cause__ or error
        raise ConfigError(f"{files[0].parent}: the Parquet files cannot be read together: {reason}") from error
    assert isinstance(rows, datasets.Dataset)
    return ArrowRows(rows, files=files, first_rows=[0, *accumulate(num_rows)])


def open_datasets(files: list[Path], config: DataConfig) -> ArrowRows:
    """Rows of folders that ``datasets`` saved; raises ``ConfigError`` for folders of several splits."""
    parts = []
    for folder in files:
        try:
            part = datasets.load_from_disk(folder)
        except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
            raise ConfigError(f"{folder}: datasets cannot read the folder: {error}") from error
        if isinstance(part, datasets.DatasetDict):
            paths = " or ".join(str(folder / str(split)) for split in part)
            raise ConfigError(f"{folder} has several data sets, one a split; set the path to one: {paths}")
        parts.append(part.with_format(None).select_columns(_choose_columns(folder, part.column_names, config)))
    try:
        rows = datasets.concatenate_datasets(parts)
    except ValueError as error:
        raise ConfigError(f"{files[0].parent}: the data sets do not go together: {error}") from error
    return ArrowRows(rows, files=files, first_rows=[0, *accumulate(len(part) for part in parts)])


def _choose_columns(file: Path, columns: list[str], config: DataConfig) -> list[str]:
    keys = (config.text_key, config.prompt_key, config.completion_key, config.messages_key)
    chosen = [key for key in keys if key in columns]
    if not chosen:
        raise ConfigError(
            f"{file} has none of the columns {', '.join(keys)} (data.text_key, ...); it has {', '.join(columns)}"
        )
    return chosen
