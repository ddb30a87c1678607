"""A registry of implementations by name, resolved on first use.

Entries are ``"module:attribute"`` strings, so naming an implementation never imports its dependencies
(flash-attn, ray, triton) before somebody asks for it.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import Any


def load(target: str) -> Any:
    """The object behind ``"module:attribute"``."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


class Registry:
    """Implementations of one kind, by name.

    Args:
        kind: what the entries are, for error messages ("attention", "transport").
        entries: name -> ``"module:attribute"``.
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def register(self, name: str, target: str) -> None:
        """Add ``name``; raises ``ValueError`` if the name is taken by another target."""
        if self._entries.setdefault(name, target) != target:
            raise ValueError(f"{self.kind} {name!r} is already registered as {self._entries[name]}")

    def get(self, name: str) -> Any:
        """The object behind ``name``; raises ``ValueError`` that lists the names there are."""
        if name not in self._entries:
            raise ValueError(f"{self.kind} {name!r} is unknown; allowed: {', '.join(self)}")
        return load(self._entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries
