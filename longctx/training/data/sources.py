"""Where rows of data are: a source per format, read at random by row number, over many files. No torch here.

A new format is a class or function that takes ``(files, config)`` and returns a ``RowSource``, a line in ``SOURCES``,
its file names in ``SUFFIXES``, and its name in ``config.FORMATS``. Left out: compressed files, which cannot be read at
random.
"""

import glob
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from longctx.errors import ConfigError
from longctx.training.data.config import DataConfig
from parallel.registry import Registry

SUFFIXES = {"jsonl": (".jsonl", ".ndjson", ".json"), "parquet": (".parquet",), "text": (".txt", ".md")}
SOURCES = Registry(
    "data format",
    {
        "jsonl": "longctx.training.data.jsonl:JsonLines",
        "parquet": "longctx.training.data.arrow:open_parquet",
        "text": "longctx.training.data.text_files:TextFiles",
        "datasets": "longctx.training.data.arrow:open_datasets",
        "demo": "longctx.training.data.demo_rows:DemoRows",
    },
)
DEMO_NAMES = ("demo", "demo-held-out")  # rows that are generated (demo_rows.py); ./demo is a file or folder
_FORMAT_OF_SUFFIX = {suffix: name for name, suffixes in SUFFIXES.items() for suffix in suffixes}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_SAVED_DATASET = ("state.json", "dataset_dict.json")  # what datasets' save_to_disk leaves in a folder


class RowSource(Protocol):
    """Rows with numbers from 0 on."""

    def __len__(self) -> int: ...

    def place(self, row_idx: int) -> str:
        """Where the row is, as a user finds it: ``FILE:LINE``, ``FILE#ROW`` (from 0) or ``FILE``."""
        ...

    def read(self, row_idx: int) -> dict[str, Any]:
        """The row's values by key; raises ``DataError`` if it cannot be read."""
        ...


@dataclass(frozen=True, slots=True)
class _Found:
    path: Path
    format: str | None  # by its name
    named: bool  # by the user; else it lies in a folder that was


def open_source(path: str | None, config: DataConfig, *, option: str = "data.path") -> RowSource:
    """The rows of ``path``, in the order of file names.

    Args:
        path: a file, folder or glob. Folders are searched for files whose names say that they are of the format.
        config: the format and the keys.
        option: the configuration key that holds ``path``, for error messages.

    Raises:
        ConfigError: nothing is there, it has no rows, or its format is not clear.
    """
    format_name, files = _choose_files(path, config, option)
    source: RowSource = SOURCES.get(format_name)(files, config)
    if len(source) == 0:
        raise ConfigError(f"{option}={path} is empty: {len(files)} {format_name} files without a row")
    return source


def check_path(path: str | None, config: DataConfig, *, option: str = "data.path") -> None:
    """Raise ``ConfigError`` as ``open_source`` does, for what shows without reading a file."""
    _, files = _choose_files(path, config, option)
    if path not in DEMO_NAMES and all(file.is_file() and not file.stat().st_size for file in files):
        raise ConfigError(f"{option}={path} is empty: {len(files)} files without a byte")


def locate(first_rows: list[int], row_idx: int) -> tuple[int, int]:
    """Which of several files has a row, and its number there.

    Args:
        first_rows: ``[num_files + 1]``, the number of each file's first row, and of all rows.
        row_idx: over all files.
    """
    assert 0 <= row_idx < first_rows[-1], f"row {row_idx} of {first_rows[-1]}"
    file_idx = bisect_right(first_rows, row_idx) - 1
    return file_idx, row_idx - first_rows[file_idx]


def _choose_files(path: str | None, config: DataConfig, option: str) -> tuple[str, list[Path]]:
    """The format's name, and the files or folders of it."""
    if not path:
        raise ConfigError(f"{option} is not set; it takes a file, a folder or a glob of files")
    if path in DEMO_NAMES:
        if config.format not in ("auto", "demo"):
            raise ConfigError(f"data.format={config.format} is not allowed with {option}={path}: auto or demo")
        return "demo", [Path(path)]
    if config.format == "demo":
        raise ConfigError(f"{option}={path} is not allowed with data.format=demo: {' or '.join(DEMO_NAMES)}")
    found = _find(path, option)
    format_name = _choose_format(found, f"{option}={path}") if config.format == "auto" else config.format
    folders = format_name == "datasets"
    files = [
        one.path
        for one in found
        if one.format == format_name or (one.named and not folders and one.format != "datasets")
    ]
    if not files:
        wanted = "a folder that datasets' save_to_disk wrote" if folders else " ".join(SUFFIXES[format_name])
        raise ConfigError(f"{option}={path} has nothing of data.format={format_name} ({wanted})")
    return format_name, files


def _find(path: str, option: str) -> list[_Found]:
    whole = Path(path).expanduser()
    if whole.exists():
        matches = [whole]
    elif glob.has_magic(path):
        matches = [Path(match) for match in sorted(glob.glob(str(whole), recursive=True))]
    else:
        raise ConfigError(f"{option}={path} does not exist (seen from {Path.cwd()})")
    found = [one for match in matches for one in _look_at(match)]
    for one in found:
        if one.path.suffix in _COMPRESSED:
            raise ConfigError(f"{option}={path}: {one.path} is compressed; unpack it, rows are read at random")
    if not found:
        known = " ".join(_FORMAT_OF_SUFFIX)
        raise ConfigError(f"{option}={path} has no data: no file there has a name that ends in one of {known}")
    return found


def _look_at(path: Path, named: bool = True) -> list[_Found]:
    """``path`` itself if it is a file or a saved data set, else what lies in the folder, at any depth."""
    if path.is_file():
        known = path.suffix in _FORMAT_OF_SUFFIX
        compressed = path.suffix in _COMPRESSED and Path(path.stem).suffix in _FORMAT_OF_SUFFIX
        if not (named or known or compressed):
            return []
        return [_Found(path, _FORMAT_OF_SUFFIX.get(path.suffix), named)]
    if any((path / name).is_file() for name in _SAVED_DATASET):
        return [_Found(path, "datasets", named)]
    inside = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
    # Links to folders are left out: they may lead back here.
    return [
        one for child in inside if child.is_file() or not child.is_symlink() for one in _look_at(child, named=False)
    ]


def _choose_format(found: list[_Found], what: str) -> str:
    for one in found:
        if one.format is None:
            known = " ".join(_FORMAT_OF_SUFFIX)
            raise ConfigError(f"{what}: the name of {one.path} does not say its format ({known}); set data.format")
    counts = Counter(one.format for one in found if one.format is not None)
    if len(counts) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        raise ConfigError(f"{what} has files of several formats: {listed}; set data.format to one of them")
    return next(iter(counts))
