"""The API keys that are accepted now: those of the configuration, and those of a file that may change."""

import hmac
import logging
import os
import time
from collections.abc import Callable, Sequence

from cluster.config import ServerConfig
from cluster.key_file import ApiKey, digest_key, read_keys
from longctx.errors import ConfigError

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0  # between two looks at the file

Stamp = tuple[int, int, int]  # changes when the file does


def load_keys(server: ServerConfig) -> tuple[ApiKey, ...]:
    """Keys of the configuration and of its key file; raises ``ConfigError`` if the file cannot be used."""
    if not all(isinstance(key, str) and key for key in server.api_keys):
        raise ConfigError("server.api_keys holds an empty key; allowed are non-empty strings")
    keys = [ApiKey(f"key-{index}", digest_key(key.encode()), key) for index, key in enumerate(server.api_keys)]
    if server.api_key_file is None:
        return tuple(keys)
    found = read_keys(server.api_key_file)
    if not found:  # an empty file would else open the server to everybody
        raise ConfigError(
            f"server.api_key_file={server.api_key_file!r} holds no key; longctx keys add name=NAME makes one"
        )
    _check_names(keys, found, server.api_key_file)
    return (*keys, *found)


def pick_key(server: ServerConfig) -> str | None:
    """A key to ask with; None where none is asked for. Raises ``ConfigError`` if hashes are all there is."""
    keys = load_keys(server)
    texts = [key.text for key in keys if key.text]
    if keys and not texts:
        raise ConfigError(
            f"server.api_key_file={server.api_key_file!r} holds hashes alone; to ask, server.api_keys=[KEY]"
        )
    return texts[0] if texts else None


class KeyRing:
    """Finds whose key a request has.

    Args:
        server: where keys come from.
        clock: seconds that only grow.
    """

    def __init__(self, server: ServerConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._path = server.api_key_file
        self._stamp = None if self._path is None else _stamp_quietly(self._path)  # before it is read: it may change
        keys = load_keys(server)
        self._own = keys[: len(server.api_keys)]
        self._keys = keys
        self._look_at = clock() + LOOK_INTERVAL_S
        self._problem = ""  # with the file, told once
        self.is_open = not keys  # everybody may ask; a file that loses its keys does not open the server

    def find(self, key: bytes) -> str | None:
        """Name of the tenant whose key this is; None if nobody's."""
        self._look()
        # Every key is compared, as digests of one length: the time taken tells nothing of a key.
        digest = digest_key(key)
        names = [each.name for each in self._keys if hmac.compare_digest(digest, each.digest)]
        return names[0] if names else None

    def _look(self) -> None:
        """Read the file again if it has changed; one that cannot be used leaves the keys as they are."""
        now = self._clock()
        if self._path is None or now < self._look_at:
            return
        self._look_at = now + LOOK_INTERVAL_S
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            found = read_keys(self._path)
            _check_names(self._own, found, self._path)
        except (OSError, ConfigError) as error:
            self._stamp = None
            if str(error) != self._problem:
                logger.error("the API keys stay as they were: %s", error)
            self._problem = str(error)
            return
        self._problem = ""
        self._keys = (*self._own, *found)
        logger.warning("server.api_key_file has changed: %d keys", len(found))


def _check_names(own: Sequence[ApiKey], found: Sequence[ApiKey], path: str) -> None:
    if taken := {key.name for key in own} & {key.name for key in found}:
        raise ConfigError(
            f"server.api_key_file={path!r} names {', '.join(sorted(taken))}, as server.api_keys are called"
        )


def _stamp(path: str) -> Stamp:
    status = os.stat(os.path.expanduser(path))
    return status.st_mtime_ns, status.st_size, status.st_ino


def _stamp_quietly(path: str) -> Stamp | None:
    """None if it is not there: whoever reads it says so better."""
    try:
        return _stamp(path)
    except OSError:
        return None
