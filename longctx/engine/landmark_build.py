"""What an engine for a landmark model is made of besides: pages that are blocks, landmarks' keys, tiers."""

import logging
import shutil
import tempfile
from pathlib import Path

import psutil
import torch

from longctx.attention.backend import AttentionBackend
from longctx.attention.config import AttentionConfig
from longctx.attention.landmark_paged import LandmarkAttention
from longctx.attention.landmark_retrieval import Retrieval
from longctx.attention.torch_paged import TorchPagedAttention
from longctx.engine.config import EngineConfig
from longctx.engine.rows import DecodeRows
from longctx.engine.runner import ModelRunner
from longctx.errors import ConfigError
from longctx.models.attention_spec import LandmarkSpec
from longctx.models.packed import PackedDecoder
from memory.block_store import BlockFile, BlockStore, HostBlocks
from memory.landmark_keys import LandmarkKeys, make_landmark_table
from memory.layout import KVLayout
from memory.pages import PagePool
from memory.tiered_pages import MIN_CACHE, TieredPages
from parallel.option import parse_budget

logger = logging.getLogger(__name__)

AUTO_CONTEXTS = 2  # that fit below, if nothing is said
AUTO_SHARE = 0.5  # of what is free, at most


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
    *,
    device: torch.device,
    max_context: int,
) -> TieredPages | None:
    """Pages of which ``num_near`` are near and the rest below; None if all are near.

    Raises:
        ConfigError: if too few fit near to compute a step, or there is no room below.
    """
    if attention.blocks == "near":
        return None
    num_staging = -(-engine.max_batch_tokens // layout.page_size) + 2 * engine.max_sequences
    if num_near < num_staging + MIN_CACHE:
        raise ConfigError(
            f"engine.kv_bytes={engine.kv_bytes} is not allowed: {num_staging + MIN_CACHE} pages of {layout.page_bytes} "
            "bytes have to be near (engine.max_batch_tokens / page + 2 engine.max_sequences are being filled, "
            f"{MIN_CACHE} are looked at), {num_near} fit"
        )
    num_pages = _count_below(attention, layout, max_context)
    return TieredPages(
        layout,
        num_pages,
        num_staging=num_staging,
        num_cached=num_near - num_staging,
        store=_make_store(attention, layout, num_pages, device),
        device=device,
    )


def take_landmarks(
    decoder: PackedDecoder,
    method: LandmarkSpec,
    attention: AttentionConfig,
    *,
    pages: PagePool | TieredPages,
) -> None:
    """Let ``decoder`` compute landmark attention over ``pages``."""
    tiers = pages if isinstance(pages, TieredPages) else None
    if isinstance(pages, PagePool):
        keys = LandmarkKeys(pages.landmarks)
    else:
        keys = make_landmark_table(pages.layout, pages.num_pages, decoder.device)
    decoder.backend = LandmarkAttention(
        decoder.backend,
        keys,
        decoder.rotary,
        spec=method,
        retrieval=Retrieval(attention.top_k, attention.retrieval),
        skip_below=attention.skip_below,
        tiers=tiers,
    )


def make_near_runner(decoder: PackedDecoder, near: PagePool, rows: DecodeRows) -> ModelRunner:
    """A runner whose steps write to the near part of tiered pages."""
    return ModelRunner(
        decoder, near, rows=rows, device=decoder.device, needs_rope_lens=decoder.rotary.depends_on_length
    )


def _count_below(attention: AttentionConfig, layout: KVLayout, max_context: int) -> int:
    free = _free_bytes(attention)
    budget = parse_budget(attention.blocks_bytes)
    if budget is None:
        budget = min(int(free * AUTO_SHARE), AUTO_CONTEXTS * layout.num_pages(max_context) * layout.page_bytes)
    elif budget > free:
        raise ConfigError(
            f"attention.blocks_bytes={attention.blocks_bytes} is not allowed: {free / 2**30:.1f} GiB are free"
        )
    if budget < layout.page_bytes:
        raise ConfigError(
            f"attention.blocks_bytes={attention.blocks_bytes} is not allowed: {budget} bytes do not hold one block of "
            f"{layout.page_bytes} bytes"
        )
    return budget // layout.page_bytes


def _free_bytes(attention: AttentionConfig) -> int:
    if attention.blocks == "host":
        return psutil.virtual_memory().available
    folder = _folder(attention)
    if not folder.is_dir():
        raise ConfigError(f"attention.blocks_folder={folder} is not allowed: there is no such folder")
    return shutil.disk_usage(folder).free


def _folder(attention: AttentionConfig) -> Path:
    return Path(attention.blocks_folder or tempfile.gettempdir())


def _make_store(attention: AttentionConfig, layout: KVLayout, num_pages: int, device: torch.device) -> BlockStore:
    logger.info("%d blocks (%.1f GiB) in %s", num_pages, num_pages * layout.page_bytes / 2**30, attention.blocks)
    if attention.blocks == "host":
        return HostBlocks(layout, num_pages, pinned=device.type == "cuda")
    return BlockFile(layout, num_pages, _folder(attention))
