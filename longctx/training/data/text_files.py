"""Text files: every file is a row."""

from pathlib import Path
from typing import Any

from longctx.errors import DataError
from longctx.training.data.config import DataConfig


class TextFiles:
    """A row per UTF-8 file.

    Args:
        files: in the order of rows.
        config: the key that a row has its text under.
    """

    def __init__(self, files: list[Path], config: DataConfig) -> None:
        self._files = files
        self._text_key = config.text_key

    def __len__(self) -> int:
        return len(self._files)

    def place(self, row_idx: int) -> str:
        return str(self._files[row_idx])

    def read(self, row_idx: int) -> dict[str, Any]:
        try:
            return {self._text_key: self._files[row_idx].read_bytes().decode("utf-8-sig")}
        except OSError as error:
            raise DataError(f"{self.place(row_idx)}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{self.place(row_idx)}: not UTF-8 text at byte {error.start}") from None
