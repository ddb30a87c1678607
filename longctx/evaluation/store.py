"""Results in a folder: a line for every prompt as it is answered, and all of it as one JSON at the end.

``prompts.jsonl`` begins with a header that says what was measured; a run goes on only with results of the same kind.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from longctx.errors import ConfigError
from longctx.evaluation.record import Key, PromptRecord, read_record

FORMAT = 1
LINES, RESULTS = "prompts.jsonl", "results.json"
# Settings that may differ between runs that are put together: what is measured, not how.
FREE = frozenset(
    {
        "tasks",
        "lengths",
        "depths",
        "num_prompts",
        "first_prompt",
        "output",
        "resume",
        "endpoint",
        "concurrency",
        "timeout_s",
    }
)


def check_folder(folder: Path, *, resume: bool) -> None:
    """Raise ``ConfigError`` if results could not be written there, or are there and must not be mixed with others."""
    lines = folder / LINES
    if lines.exists() and not resume:
        raise ConfigError(
            f"eval.output={folder} holds results already: eval.resume=true goes on with them, or choose another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lines.open("a"):
            pass
        if not lines.stat().st_size:
            lines.unlink()
    except OSError as error:
        raise ConfigError(f"eval.output={folder} cannot be written: {error.strerror}") from None


class ResultStore:
    """The results of one folder.

    Args:
        folder: made if missing.
        header: what is measured, and how: plain values.

    Raises:
        ConfigError: if the folder holds results that were measured otherwise.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder = folder
        self.header: dict[str, Any] = {"format": FORMAT, **header}
        self.records: dict[Key, PromptRecord] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / LINES).exists():
            self._read(folder / LINES)
        self._file = self._begin()

    def add(self, record: PromptRecord) -> None:
        """Keep a record; it is on the disk when this returns."""
        self.records[record.key] = record
        _write_line(self._file, record.to_json())

    def finish(self, summary: Sequence[dict[str, Any]], *, is_complete: bool) -> Path:
        """Write everything as one JSON; returns its path."""
        path = self.folder / RESULTS
        content = self.header | {
            "is_complete": is_complete,
            "summary": list(summary),
            "prompts": [record.to_json() for record in self.records.values()],
        }
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, path: Path) -> None:
        first, *lines = path.read_text(encoding="utf-8").split("\n")
        try:
            header = json.loads(first)
            self._check(header)
            # The last one is empty, or was cut off with the process that wrote it.
            records = [read_record(json.loads(line)) for line in lines[:-1]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is not what longctx eval writes: {error}") from None
        self.records = {record.key: record for record in records}

    def _check(self, header: dict[str, Any]) -> None:
        for name in ("format", "haystack", "text", "style"):
            _compare(self.folder, name, header[name], self.header[name])
        for name, value in self.header["model"].items():
            if name not in FREE:
                _compare(self.folder, f"model {name}", header["model"].get(name), value)
        for name, value in self.header["settings"].items():
            if name not in FREE:
                _compare(self.folder, f"eval.{name}", header["settings"].get(name), value)

    def _begin(self) -> TextIO:
        """The file written anew, without a line that was cut off, and open for more."""
        path = self.folder / LINES
        replacement = path.with_suffix(".new")
        with replacement.open("w", encoding="utf-8") as file:
            _write_line(file, self.header)
            for record in self.records.values():
                _write_line(file, record.to_json())
        replacement.replace(path)
        return path.open("a", encoding="utf-8")


def _compare(folder: Path, name: str, theirs: Any, ours: Any) -> None:
    if theirs != json.loads(json.dumps(ours)):
        raise ConfigError(f"eval.output={folder} holds results of {name}={theirs}, not {ours}; choose another folder")


def _write_line(file: TextIO, values: dict[str, Any]) -> None:
    file.write(json.dumps(values, ensure_ascii=False) + "\n")
    file.flush()
