"""From the ``model`` and ``engine`` groups of the configuration to an engine."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from longctx.adapters.folder import choose_adapter
from longctx.attention.backend import AttentionBackend
from longctx.attention.config import AttentionConfig, choose_method, warn_untrained
from longctx.attention.registry import choose_attention
from longctx.engine.config import EngineConfig
from longctx.engine.core_build import make_core_pages, take_cores
from longctx.engine.core_method import CoreMethod, count_context_pages
from longctx.engine.engine import Engine
from longctx.engine.landmark_build import (
    choose_for_blocks,
    make_near_runner,
    make_tiers,
    take_landmarks,
    take_sharded_landmarks,
)
from longctx.engine.method import DenseMethod, EngineMethod
from longctx.engine.page_budget import count_cores, count_pages
from longctx.engine.page_place import PagePlace, make_near
from longctx.engine.prefix_tier import open_prefix_store
from longctx.engine.runner import Runner
from longctx.errors import ConfigError
from longctx.models.attention_spec import AttentionSpec, CCASpec, LandmarkSpec
from longctx.models.checkpoint import ModelSpec, choose_context, inspect_checkpoint
from longctx.models.config import ModelConfig
from longctx.models.loading import load_model
from longctx.models.packed import PackedDecoder
from longctx.models.tokenizer import load_tokenizer
from longctx.shards.attention import ShardedAttention
from longctx.shards.core_rank import CoreRank
from longctx.shards.core_runner import CoreGroupRunner
from longctx.shards.group import ShardGroup
from longctx.shards.prefixes import ShardedStore
from longctx.shards.rank import ShardRank
from longctx.shards.runner import Rank, ShardRunner
from memory.layout import KVLayout
from memory.lower_pages import LowerPages
from memory.pages import DTYPES, PageAllocator, PagePool
from memory.prefix_cache import PageStore
from memory.prefix_store import PrefixStore
from memory.rank_tiers import RankTiers
from memory.sharded_pages import ShardedPages
from memory.tiered_pages import TieredPages

logger = logging.getLogger(__name__)

MakePool = Callable[[KVLayout, int], PagePool]


@dataclass(frozen=True, slots=True)
class _Parts:
    spec: ModelSpec
    decoder: PackedDecoder
    pages: PagePool | TieredPages
    max_context: int
    method: AttentionSpec | None
    below: LowerPages | None = None  # what leaves the window of CCA attention, to be fetched
    store: PrefixStore | None = None  # pages of prefixes in a folder


def build_engine(
    model_config: ModelConfig,
    engine_config: EngineConfig,
    *,
    attention: AttentionConfig | None = None,
    make_pool: MakePool | None = None,
    random_weights_seed: int | None = None,
    shards: ShardGroup | None = None,
    ships: bool = False,
) -> Engine:
    """Load a model and make an engine for it.

    Args:
        model_config: which checkpoint, and how it runs.
        engine_config: pages, batches and queues; with ``shards``, of each rank.
        attention: which method runs, and how; None: what the checkpoint was trained with.
        make_pool: makes the page pool from a layout and a number of pages, where its storage is not plain memory.
        random_weights_seed: make the weights up (benchmarks).
        shards: the ranks that share its sequences; this process is rank 0, the others call ``build_rank``.
        ships: prompts are computed for other workers, or by them.

    Raises:
        CheckpointError: the checkpoint or the adapter cannot be served.
        ConfigError: naming the key, its value and what is allowed.
        ExchangeError: if a rank is lost.
    """
    parts = _load(model_config, engine_config, attention, make_pool, random_weights_seed, shards, ships=ships)
    decoder, layout = parts.decoder, parts.pages.layout
    config = engine_config if shards is None else shards.widen(engine_config)
    pages: PageAllocator = parts.pages
    if shards is not None and not isinstance(parts.method, CCASpec):
        pages = ShardedPages(
            layout,
            parts.pages.num_pages,
            world_size=shards.group.world_size,
            stretch_pages=max(1, config.max_batch_tokens // layout.page_size),
            own=parts.pages,
        )
    engine = Engine(
        decoder,
        pages,
        tokenizer=load_tokenizer(parts.spec, model_config.chat_template),
        config=config,
        max_context=parts.max_context,
        make_method=_choose_engine_method(parts, shards, pages),
    )
    if parts.store is not None:
        engine.use_store(_share_store(parts.store, pages, engine.runner))
    logger.info(
        "%s: %s on %s, attention %s, %d pages of %d tokens (%.0f MiB), context %d tokens",
        parts.spec.name,
        str(decoder.dtype).removeprefix("torch."),
        decoder.device,
        decoder.backend.name,
        pages.num_pages,
        layout.page_size,
        pages.num_pages * layout.page_bytes / 2**20,
        engine.max_context,
    )
    return engine


def _choose_engine_method(
    parts: _Parts, shards: ShardGroup | None, pages: PageAllocator
) -> Callable[..., EngineMethod]:
    make_runner = None
    if isinstance(parts.method, CCASpec):
        if shards is not None:
            make_runner = partial(CoreGroupRunner, _make_core_rank(parts, shards), shards.group, shards.timeout_s)
        return partial(CoreMethod, parts.method, below=parts.below, make_runner=make_runner)
    if shards is not None:
        assert isinstance(pages, ShardedPages)
        make_runner = partial(ShardRunner, _make_rank(parts, shards), pages, shards.group, shards.timeout_s)
    elif isinstance(parts.pages, TieredPages):
        make_runner = partial(make_near_runner, parts.decoder, parts.pages.near)
    return partial(DenseMethod, make_runner=make_runner)


def _share_store(store: PrefixStore, pages: PageAllocator, runner: Runner) -> PageStore:
    if not isinstance(pages, ShardedPages):
        return store
    assert isinstance(runner, ShardRunner)
    return ShardedStore(store, pages, runner)


def build_rank(
    model_config: ModelConfig,
    engine_config: EngineConfig,
    shards: ShardGroup,
    *,
    attention: AttentionConfig | None = None,
    make_pool: MakePool | None = None,
    random_weights_seed: int | None = None,
) -> Rank:
    """Another rank than 0 of a sharded engine, to be handed to ``follow``; see ``build_engine``."""
    parts = _load(model_config, engine_config, attention, make_pool, random_weights_seed, shards)
    return (_make_core_rank if isinstance(parts.method, CCASpec) else _make_rank)(parts, shards)


def _load(
    model_config: ModelConfig,
    engine_config: EngineConfig,
    attention: AttentionConfig | None,
    make_pool: MakePool | None,
    random_weights_seed: int | None,
    shards: ShardGroup | None,
    *,
    ships: bool = False,
) -> _Parts:
    spec = inspect_checkpoint(model_config.path, require_weights=random_weights_seed is None)
    spec, adapter = choose_adapter(model_config.adapter, spec)
    attention = attention or AttentionConfig()
    method = choose_method(attention, spec)
    warn_untrained(method, spec)
    device = choose_device(model_config.device)
    dtype = choose_dtype(model_config.dtype, spec, device)
    max_context = choose_context(spec, model_config.max_context)
    backend = _choose_attention(model_config.attention, spec, device=device, dtype=dtype)
    if isinstance(method, LandmarkSpec):
        backend, page_size = choose_for_blocks(model_config.attention, backend, method, engine_config.page_size)
    else:
        page_size = _choose_page_size(engine_config.page_size, backend)
    num_sharing = 1 if shards is None else shards.count_on_node()
    if device.type == "cpu":
        torch.set_num_threads(engine_config.num_threads or max(1, count_cores() // num_sharing))
    loaded = load_model(spec, dtype=dtype, device=device, random_weights_seed=random_weights_seed, adapter=adapter)
    if shards is not None and method is None:
        backend = ShardedAttention(backend, shards.group.on_device(device), timeout_s=shards.timeout_s)
    decoder, below = PackedDecoder(loaded, backend), None
    if not isinstance(method, LandmarkSpec):
        decoder.rotary.reserve(max_context)
    layout = replace(decoder.layout(page_size), has_landmark=isinstance(method, LandmarkSpec))
    world_size = 1 if shards is None or isinstance(method, CCASpec) else shards.group.world_size
    context_pages = layout.num_pages(max_context)
    if isinstance(method, CCASpec):
        wide = engine_config if shards is None else shards.widen(engine_config)
        fetches = attention.core_fetch > 0
        context_pages = count_context_pages(method, wide, page_size, max_context, fetches=fetches)
    num_pages = count_pages(
        engine_config,
        layout,
        device,
        context_pages=context_pages,
        is_wanted=model_config.max_context is not None or not isinstance(method, LandmarkSpec),
        world_size=world_size,
        num_sharing=num_sharing,
        num_tabled=world_size if world_size > 1 and attention.blocks == "near" else 0,  # of all ranks' pages
    )
    if shards is not None:
        num_pages = shards.agree_on_pages(layout, num_pages)
    pages: PagePool | TieredPages | None = None
    place = PagePlace(device, max_context, make_pool, shards, num_sharing)
    if isinstance(method, LandmarkSpec):
        pages = make_tiers(attention, engine_config, layout, num_pages, place)
    elif isinstance(method, CCASpec):
        pages, below = make_core_pages(attention, layout, num_pages, place, ships=ships)
        take_cores(decoder, method, attention, below=below, shards=shards)
    if pages is None:
        pages = make_near(layout, num_pages, place)
    if isinstance(method, LandmarkSpec):
        if shards is None:
            take_landmarks(decoder, method, attention, pages=pages)
        else:
            assert isinstance(pages, PagePool | RankTiers)
            carrier = shards.group.on_device(device)
            take_sharded_landmarks(decoder, method, attention, pages=pages, carrier=carrier, timeout_s=shards.timeout_s)
    store = None
    if shards is None or shards.group.rank == 0 or not isinstance(method, CCASpec):  # under CCA rank 0 has all pages
        store = open_prefix_store(engine_config, model_config, decoder, pages, method=method, attention=attention)
    return _Parts(spec, decoder, pages, max_context, method, below=below, store=store)


def _make_rank(parts: _Parts, shards: ShardGroup) -> ShardRank:
    assert isinstance(parts.pages, PagePool | RankTiers)
    return ShardRank(
        parts.decoder,
        parts.pages,
        rank=shards.group.rank,
        world_size=shards.group.world_size,
        pages_per_rank=parts.pages.num_pages,
        choice=shards.choice,
        store=parts.store,
    )


def _make_core_rank(parts: _Parts, shards: ShardGroup) -> CoreRank:
    assert isinstance(parts.pages, PagePool)
    return CoreRank(parts.decoder, parts.pages, below=parts.below, group=shards.group, timeout_s=shards.timeout_s)


def choose_device(name: str) -> torch.device:
    """The device called ``name``; ``"auto"`` is the GPU if there is one."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("model.device='cuda' is not allowed: torch sees no GPU here; allowed: auto, cpu")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def choose_dtype(name: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """The element type called ``name``; ``"auto"`` is the checkpoint's. A CPU computes float16 as float32."""
    dtype = DTYPES[spec.dtype if name == "auto" else name]
    if dtype == torch.float16 and device.type == "cpu":
        logger.info("float16 is slow and coarse on a CPU: %s runs in float32", spec.name)
        return torch.float32
    return dtype


def _choose_attention(name: str, spec: ModelSpec, *, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    try:
        group_size = spec.num_heads // spec.num_kv_heads
        return choose_attention(name, device, dtype, spec.head_dim, group_size=group_size)
    except ValueError as error:
        raise ConfigError(f"model.attention={name!r} is not allowed: {error}") from error


def _choose_page_size(page_size: int | None, backend: AttentionBackend) -> int:
    if page_size is None:
        return backend.page_sizes[0] if backend.page_sizes else backend.preferred_page_size
    if backend.page_sizes and page_size not in backend.page_sizes:
        sizes = ", ".join(str(size) for size in sorted(backend.page_sizes))
        raise ConfigError(f"engine.page_size={page_size} is not allowed: attention {backend.name} takes {sizes}")
    return page_size
