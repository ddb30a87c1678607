"""The text that facts are hidden in: repeated filler sentences, or real text.

The filler is that of the pass key papers (Mohtashami & Jaggi, "Landmark Attention", 2023, section 4.2). Real text is a
file, or the sources of Python's standard library, which are on every machine; those that the shipped demo model was
not trained on come first.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from longctx.errors import ConfigError
from longctx.models import demo_data

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
MIN_FILE_CHARS = 1000


class Haystack(ABC):
    """Text of any length. ``boundary`` ends its lines or sentences; ``separator`` follows what is put between them."""

    boundary: str
    separator: str
    description: str  # what it is made from, and a digest of it where machines may differ

    @abstractmethod
    def open(self, rng: random.Random, num_chars: int) -> Callable[[int], str]:
        """A place to read from, as a function of the number of characters; about ``num_chars`` will be read."""

    @abstractmethod
    def holds(self, value: str) -> bool:
        """Whether ``value`` stands somewhere in it."""


class FillerHaystack(Haystack):
    """The same five sentences again and again."""

    boundary, separator, description = ". ", " ", "filler"

    def open(self, rng: random.Random, num_chars: int) -> Callable[[int], str]:
        return lambda size: (FILLER * (size // len(FILLER) + 1))[:size]

    def holds(self, value: str) -> bool:
        return value in FILLER


class TextHaystack(Haystack):
    """Real text.

    Args:
        text: all of it; read again from its start where more is wanted.
        name: where it is from.
        num_first: characters of its first part, in which what fits there is read.
    """

    boundary, separator = "\n", "\n"

    def __init__(self, text: str, name: str, *, num_first: int | None = None) -> None:
        self.text = text
        self._num_first = num_first or len(text)
        self.description = f"{name}, {len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def open(self, rng: random.Random, num_chars: int) -> Callable[[int], str]:
        room = self._num_first if num_chars <= self._num_first else len(self.text)
        start = rng.randrange(max(1, room - num_chars))
        start = self.text.rfind("\n", 0, start) + 1

        def read(size: int) -> str:
            part = self.text[start : start + size]
            while len(part) < size:
                part += self.text[: size - len(part)]
            return part

        return read

    def holds(self, value: str) -> bool:
        return value in self.text


def load_text(path: str | None) -> TextHaystack:
    """The text of a file; None: the standard library's sources, the demo model's held-out files first.

    Raises:
        ConfigError: if the file cannot be read, or is too short to be read from at random.
    """
    if path is None:
        trained, held_out = ("\n\n".join(corpus.documents) for corpus in demo_data.load_corpora())
        return TextHaystack(f"{held_out}\n\n{trained}\n\n", "Python's standard library", num_first=len(held_out))
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"eval.text={path!r} cannot be read: {error}") from None
    if len(text) < MIN_FILE_CHARS:
        raise ConfigError(f"eval.text={path!r} has {len(text)} characters; at least {MIN_FILE_CHARS} are needed")
    return TextHaystack(text, path)
