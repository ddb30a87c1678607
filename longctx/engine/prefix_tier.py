"""Opens the folder in which an engine keeps pages of prefixes, apart from those of other models and settings."""

import hashlib
from pathlib import Path

from longctx.engine.config import EngineConfig
from longctx.errors import ConfigError
from longctx.models.config import ModelConfig
from longctx.models.packed import PackedDecoder
from memory.page_files import PageFiles
from memory.pages import PageAllocator, PagePool
from memory.prefix_store import PrefixStore
from parallel.option import parse_size

_SAMPLE_BYTES = 1 << 20  # of a weights file's beginning and end: what tells it from another one


def open_prefix_store(
    config: EngineConfig, model: ModelConfig, decoder: PackedDecoder, pages: PageAllocator, *, is_special: bool
) -> PrefixStore | None:
    """The store of ``engine.prefix_folder``; None if there is to be none.

    Args:
        config, model: of the engine.
        decoder: its model.
        pages: its pool.
        is_special: its pages are not whole prefixes, or belong to several ranks.

    Raises:
        ConfigError: there is to be one, and cannot be.
    """
    if config.prefix_folder is None:
        return None
    if not config.prefix_cache:
        raise ConfigError("engine.prefix_folder is not allowed with engine.prefix_cache=false")
    if not isinstance(pages, PagePool) or is_special:
        raise ConfigError(
            "engine.prefix_folder is not allowed here: workers of several ranks, landmark blocks that lie below and "
            "CCA attention keep no pages that others can find"
        )
    most = parse_size(config.prefix_bytes)
    if most < 2 * pages.layout.page_bytes:
        raise ConfigError(
            f"engine.prefix_bytes={config.prefix_bytes} is not allowed: at least two pages of "
            f"{pages.layout.page_bytes} bytes"
        )
    name = f"{_fingerprint(model, decoder)}-{pages.layout.digest()}"
    folder = Path(config.prefix_folder).expanduser() / name
    try:
        files = PageFiles(folder, max_bytes=most, eviction=config.prefix_eviction)
    except OSError as error:
        raise ConfigError(f"engine.prefix_folder={config.prefix_folder} cannot be used: {error}") from None
    return PrefixStore(files, pages)


def _fingerprint(model: ModelConfig, decoder: PackedDecoder) -> str:
    """16 hex digits that differ wherever KV would: weights, adapters, element type, attention, how positions turn."""
    digest = hashlib.blake2b(digest_size=8)
    rotary = decoder.rotary
    digest.update(repr((str(decoder.dtype), decoder.backend.name, model.max_context, type(rotary).__name__)).encode())
    for source in (model.path, model.adapter):
        for path in sorted(Path(source).glob("*")) if source is not None else ():
            if path.suffix in (".json", ".safetensors"):
                digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
                digest.update(_sample(path))
    return digest.hexdigest()


def _sample(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(_SAMPLE_BYTES)
        file.seek(max(len(head), path.stat().st_size - _SAMPLE_BYTES))
        return head + file.read(_SAMPLE_BYTES)
