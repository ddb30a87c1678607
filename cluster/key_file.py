"""The file of API keys: what its lines say, and ``longctx keys``, which edits it.

A line is a key, or ``NAME:sha256:HEX`` with the hash of one; ``#`` begins a comment. Keys that ``longctx keys add``
makes are 256 random bits. Nobody finds such a key by trying, so a plain SHA-256 keeps it as well as a slow, salted hash
would: those are for what people make up.
"""

import fcntl
import hashlib
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.config import KeyConfig, KeyListConfig
from longctx.errors import ConfigError

KEY_PREFIX = "lc-"  # by which scanners for leaked secrets can know one
KEY_BYTES = 32
MODE = 0o600
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASHED = re.compile(rf"({_NAME.pattern}):sha256:([0-9a-f]{{64}})")
NAME_FORM = "up to 64 letters, digits, dots, dashes and underscores, the first a letter or digit"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key that is accepted."""

    name: str  # of the tenant that has it
    digest: bytes = field(repr=False)  # SHA-256
    text: str = field(default="", repr=False)  # the key, where the file or the configuration has it


def digest_key(key: bytes) -> bytes:
    """What keys are compared by."""
    return hashlib.sha256(key).digest()


def read_keys(path: str) -> list[ApiKey]:
    """The keys of a file, maybe none; raises ``ConfigError`` that names the line at fault, never what it says."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.api_key_file={path!r} cannot be read: {error}") from None
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, 1):
        key = _parse(line, number, path)
        if key is not None and keys.setdefault(key.name, key).digest != key.digest:
            raise ConfigError(f"server.api_key_file={path!r}, line {number}: {key.name!r} is there twice")
    return list(keys.values())


def add_key(config: KeyConfig) -> int:
    """Make a key, keep its hash and print it; returns the exit code. Raises ``ConfigError``."""
    name, path = _check_name(config.name), _check_path(config.server.api_key_file)
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)

    def append(lines: Sequence[str]) -> list[str]:
        if name in _names(lines, path):
            raise ConfigError(f"name={name} is not allowed: {path} has a key of this name; remove it first")
        return [*lines, f"{name}:sha256:{digest_key(key.encode()).hex()}"]

    _rewrite(path, append)
    sys.stderr.write(f"{path} has the hash of {name}'s key; the key itself is shown this once:\n")
    sys.stderr.flush()
    sys.stdout.write(key + "\n")
    return 0


def remove_key(config: KeyConfig) -> int:
    """Take a key out of the file; returns the exit code. Raises ``ConfigError`` if it is not there."""
    name, path = _check_name(config.name), _check_path(config.server.api_key_file)

    def drop(lines: Sequence[str]) -> list[str]:
        names = _names(lines, path)
        if name not in names:
            raise ConfigError(f"name={name} is not allowed: {path} has {', '.join(filter(None, names)) or 'no key'}")
        return [line for line, each in zip(lines, names, strict=True) if each != name]

    if not os.path.exists(os.path.expanduser(path)):
        raise ConfigError(f"server.api_key_file={path!r} is not allowed: there is no such file")
    _rewrite(path, drop)
    return 0


def list_keys(config: KeyListConfig) -> int:
    """Print the names; returns the exit code. Raises ``ConfigError``."""
    for key in read_keys(_check_path(config.server.api_key_file)):
        sys.stdout.write(key.name + "\n")
    return 0


def _parse(line: str, number: int, path: str) -> ApiKey | None:
    text = line.strip()
    if not text or text.startswith("#"):
        return None
    if match := _HASHED.fullmatch(text):
        return ApiKey(match[1], bytes.fromhex(match[2]))
    if ":sha256:" in text:  # whoever wrote this did not mean a key of that text
        raise ConfigError(
            f"server.api_key_file={path!r}, line {number} is not allowed: NAME:sha256:HEX, the name {NAME_FORM}, "
            "the hash 64 digits in lower case"
        )
    digest = digest_key(text.encode())
    return ApiKey(f"key-{digest.hex()[:8]}", digest, text)  # a place in the file would change with its other lines


def _names(lines: Sequence[str], path: str) -> list[str]:
    """The name that each line gives; empty for a comment."""
    keys = [_parse(line, number, path) for number, line in enumerate(lines, 1)]
    return ["" if key is None else key.name for key in keys]


def _check_name(name: str | None) -> str:
    if name is None or not _NAME.fullmatch(name):
        raise ConfigError(f"name={'null' if name is None else repr(name)} is not allowed: {NAME_FORM}")
    return name


def _check_path(path: str | None) -> str:
    if path is None:
        raise ConfigError("server.api_key_file=null is not allowed: the file of keys, as server.api_key_file=keys")
    return path


def _rewrite(path: str, change: Callable[[Sequence[str]], list[str]]) -> None:
    """Replace the file by what ``change`` makes of its lines: all of it or nothing, for the owner alone to read."""
    target = Path(os.path.realpath(os.path.expanduser(path)))
    try:
        with _lock(target.parent):
            there = target.stat() if target.exists() else None
            lines = target.read_text(encoding="utf-8").splitlines() if there else []
            content = "".join(line + "\n" for line in change(lines))
            fd, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
            try:
                with os.fdopen(fd, "w", encoding="utf-8") as file:
                    os.fchmod(fd, MODE)
                    if there and there.st_uid != os.geteuid():  # root, for a server that runs as somebody else
                        os.fchown(fd, there.st_uid, there.st_gid)
                    file.write(content)
                    file.flush()
                    os.fsync(fd)
                os.replace(temporary, target)
            except BaseException:
                os.unlink(temporary)
                raise
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.api_key_file={path!r} cannot be written: {error}") from None


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One writer at a time; the folder is locked, as the file is another one afterwards."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
