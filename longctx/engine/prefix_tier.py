"""Opens the folder in which an engine keeps pages of prefixes, apart from those of other models and settings."""

import hashlib
from dataclasses import replace
from pathlib import Path

from longctx.attention.config import LANDMARK_OPTIONS, AttentionConfig
from longctx.engine.config import EngineConfig
from longctx.errors import ConfigError
from longctx.models.attention_spec import AttentionSpec, CCASpec
from longctx.models.config import ModelConfig
from longctx.models.packed import PackedDecoder
from memory.page_files import PageFiles
from memory.pages import PagePool
from memory.prefix_store import PrefixStore
from memory.tiered_pages import TieredPages
from parallel.option import parse_size

_SAMPLE_BYTES = 1 << 20  # of a weights file's beginning and end: what tells it from another one


def open_prefix_store(
    config: EngineConfig,
    model: ModelConfig,
    decoder: PackedDecoder,
    pages: PagePool | TieredPages,
    *,
    method: AttentionSpec | None,
    attention: AttentionConfig,
) -> PrefixStore | None:
    """The store of ``engine.prefix_folder``; None if there is to be none.

    Args:
        config, model: of the engine.
        decoder: its model.
        pages: of this rank. A page is whole wherever it was computed: workers of any number of ranks share a folder.
        method, attention: which attention, and how it is used.

    Raises:
        ConfigError: there is to be one, and cannot be.
    """
    if config.prefix_folder is None:
        return None
    if not config.prefix_cache:
        raise ConfigError("engine.prefix_folder is not allowed with engine.prefix_cache=false")
    most = parse_size(config.prefix_bytes)
    if most < 2 * pages.layout.page_bytes:
        raise ConfigError(
            f"engine.prefix_bytes={config.prefix_bytes} is not allowed: at least two pages of "
            f"{pages.layout.page_bytes} bytes"
        )
    name = f"{_fingerprint(model, decoder, method, attention)}-{pages.layout.digest()}"
    folder = Path(config.prefix_folder).expanduser() / name
    try:
        files = PageFiles(folder, max_bytes=most, eviction=config.prefix_eviction)
    except OSError as error:
        raise ConfigError(f"engine.prefix_folder={config.prefix_folder} cannot be used: {error}") from None
    return PrefixStore(files, pages)


def _fingerprint(
    model: ModelConfig, decoder: PackedDecoder, method: AttentionSpec | None, attention: AttentionConfig
) -> str:
    """16 hex digits that differ wherever KV would: weights, adapters, element type, attention, how positions turn.

    Where blocks lie does not matter. Sizes of CCA's groups are in the names of its pages: a request may have its own.
    """
    digest = hashlib.blake2b(digest_size=8)
    rotary = decoder.rotary
    used = [getattr(attention, name) for name in (*LANDMARK_OPTIONS, "core_fetch")]
    if isinstance(method, CCASpec):
        method = replace(method, group_size=0, window=0)
    about = (str(decoder.dtype), decoder.backend.name, model.max_context, type(rotary).__name__, method, used)
    digest.update(repr(about).encode())
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
