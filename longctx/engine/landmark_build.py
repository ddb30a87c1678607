"""What an engine for a landmark model is made of besides: pages that are blocks, landmarks' keys, tiers."""

from longctx.attention.backend import AttentionBackend
from longctx.attention.config import AttentionConfig
from longctx.attention.landmark_paged import LandmarkAttention
from longctx.attention.landmark_retrieval import Retrieval
from longctx.attention.torch_paged import TorchPagedAttention
from longctx.engine.config import EngineConfig
from longctx.engine.context_plan import count_staging
from longctx.engine.page_place import PagePlace, make_store
from longctx.engine.rows import DecodeRows
from longctx.engine.runner import ModelRunner
from longctx.errors import ConfigError
from longctx.models.attention_spec import LandmarkSpec
from longctx.models.packed import PackedDecoder
from longctx.shards.landmarks import ShardedLandmarks
from memory.landmark_keys import LandmarkKeys
from memory.layout import MIN_CACHE, KVLayout
from memory.pages import PagePool
from memory.rank_tiers import RankTiers
from memory.tiered_pages import TieredPages
from parallel.carrier import Carrier


def choose_for_blocks(
    name: str, backend: AttentionBackend, method: LandmarkSpec, page_size: int | None
) -> tuple[AttentionBackend, int]:
    """An implementation whose pages can be landmark blocks, and their size.

    Raises:
        ConfigError: if the one called ``name`` has no such pages, or ``page_size`` is another.
    """
    if page_size not in (None, method.block_size):
        raise ConfigError(
            f"engine.page_size={page_size} is not allowed: pages hold a landmark's block, {method.block_size} tokens"
        )
    if backend.page_sizes and method.block_size not in backend.page_sizes:
        if name != "auto":
            raise ConfigError(
                f"model.attention={name!r} is not allowed: it has no pages of {method.block_size} tokens, a landmark's "
                "block; auto or torch"
            )
        backend = TorchPagedAttention()
    return backend, method.block_size


def make_tiers(
    attention: AttentionConfig,
    engine: EngineConfig,
    layout: KVLayout,
    num_near: int,
    place: PagePlace,
) -> TieredPages | None:
    """Pages of which ``num_near`` are near and the rest below; None if all are near.

    Any of several ranks may have to hold all pages that a step writes to.

    Raises:
        ConfigError: if too few fit near to compute a step, or there is no room below.
    """
    if attention.blocks == "near":
        return None
    sp_degree = 1 if place.shards is None else place.shards.group.world_size
    share = "" if place.shards is None else f"{sp_degree} "
    num_staging = count_staging(engine, layout.page_size, sp_degree=sp_degree)
    if num_near < num_staging + MIN_CACHE:
        raise ConfigError(
            f"engine.kv_bytes={engine.kv_bytes} is not allowed: {num_staging + MIN_CACHE} pages of {layout.page_bytes} "
            f"bytes have to be near ({share}engine.max_batch_tokens / page + 2 engine.max_sequences are being filled, "
            f"{MIN_CACHE} are looked at), {num_near} fit"
        )
    store = make_store(attention, layout, place, num_tokens=-(-place.max_context // sp_degree))
    kind = TieredPages if place.shards is None else RankTiers
    return kind(layout, num_staging=num_staging, num_cached=num_near - num_staging, store=store, device=place.device)


def take_landmarks(
    decoder: PackedDecoder,
    method: LandmarkSpec,
    attention: AttentionConfig,
    *,
    pages: PagePool | TieredPages,
) -> None:
    """Let ``decoder`` compute landmark attention over ``pages``."""
    tiers = pages if isinstance(pages, TieredPages) else None
    keys = LandmarkKeys(pages.landmarks) if isinstance(pages, PagePool) else pages.landmark_keys
    decoder.backend = LandmarkAttention(
        decoder.backend, keys, decoder.rotary, spec=method, retrieval=_retrieval(attention), tiers=tiers
    )


def take_sharded_landmarks(
    decoder: PackedDecoder,
    method: LandmarkSpec,
    attention: AttentionConfig,
    *,
    pages: PagePool | RankTiers,
    carrier: Carrier,
    timeout_s: float,
) -> None:
    """Let ``decoder`` compute landmark attention over this rank's ``pages`` and the other ranks'."""
    decoder.backend = ShardedLandmarks(
        decoder.backend,
        pages,
        decoder.rotary,
        spec=method,
        retrieval=_retrieval(attention),
        carrier=carrier,
        timeout_s=timeout_s,
    )


def _retrieval(attention: AttentionConfig) -> Retrieval:
    return Retrieval(attention.top_k, attention.retrieval, attention.skip_below)


def make_near_runner(decoder: PackedDecoder, near: PagePool, rows: DecodeRows) -> ModelRunner:
    """A runner whose steps write to the near part of tiered pages."""
    return ModelRunner(
        decoder, near, rows=rows, device=decoder.device, needs_rope_lens=decoder.rotary.depends_on_length
    )
