"""Where an engine's pages lie: near the compute, and below it in host memory or a memory-mapped file."""

import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from longctx.attention.config import BELOW_CONTEXTS, BELOW_SHARE, AttentionConfig
from longctx.errors import ConfigError
from longctx.shards.group import ShardGroup
from memory.block_store import BlockStore, FilePool
from memory.layout import KVLayout
from memory.pages import PagePool
from parallel.option import parse_budget

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PagePlace:
    """Where an engine's pages are, and who has them."""

    device: torch.device  # near the compute
    max_context: int  # tokens of a sequence at most
    make_pool: Callable[[KVLayout, int], PagePool] | None = None  # allocates memory that a transport can send from
    shards: ShardGroup | None = None  # ranks that have as many pages each; all of them allocate
    num_sharing: int = 1  # ranks on this machine


def make_near(layout: KVLayout, num_pages: int, place: PagePlace) -> PagePool:
    """Pages near the compute; on a GPU they are sent by way of a buffer in host memory."""
    if place.make_pool is not None and place.device.type == "cpu":
        return place.make_pool(layout, num_pages)
    return PagePool(layout, num_pages, device=place.device)


def make_store(
    attention: AttentionConfig, layout: KVLayout, place: PagePlace, *, num_tokens: int, num_beside: int = 0
) -> BlockStore:
    """A store.

    Args:
        attention: where it is, and how large.
        layout: of its pages.
        place: whose ``make_pool`` allocates it in host memory.
        num_tokens: of a sequence that lie in it at most.
        num_beside: pages that it has places for besides, which no rank has to agree on.

    Raises:
        ConfigError: if there is no room.
    """
    num_pages = _count_below(attention, layout, num_tokens, place.num_sharing, num_beside)
    if place.shards is not None:
        num_pages = place.shards.agree_on_pages(layout, num_pages)
    num_pages += num_beside
    logger.info("%d blocks (%.1f GiB) in %s", num_pages, num_pages * layout.page_bytes / 2**30, attention.below)
    if attention.below == "file":
        return BlockStore(FilePool(layout, num_pages, _folder(attention)))
    if place.make_pool is not None:
        return BlockStore(place.make_pool(layout, num_pages))
    if place.device.type == "cpu":
        return BlockStore(PagePool(layout, num_pages))
    shape = (layout.num_layers, num_pages, layout.block_bytes)
    return BlockStore(PagePool(layout, num_pages, storage=torch.zeros(shape, dtype=torch.uint8, pin_memory=True)))


def _count_below(
    attention: AttentionConfig, layout: KVLayout, num_tokens: int, num_sharing: int, num_beside: int
) -> int:
    free = max(0, _free_bytes(attention) // num_sharing - num_beside * layout.page_bytes)
    budget = parse_budget(attention.blocks_bytes)
    if budget is None:
        budget = min(int(free * BELOW_SHARE), BELOW_CONTEXTS * layout.num_pages(num_tokens) * layout.page_bytes)
    elif budget > free:
        raise ConfigError(
            f"attention.blocks_bytes={attention.blocks_bytes} is not allowed: {free / 2**30:.1f} GiB are free"
            + (f" for each of {num_sharing} ranks" if num_sharing > 1 else "")
        )
    if budget < layout.page_bytes:
        raise ConfigError(
            f"attention.blocks_bytes={attention.blocks_bytes} is not allowed: {budget} bytes do not hold one block of "
            f"{layout.page_bytes} bytes"
        )
    return budget // layout.page_bytes


def _free_bytes(attention: AttentionConfig) -> int:
    if attention.below == "host":
        return psutil.virtual_memory().available
    folder = _folder(attention)
    if not folder.is_dir():
        raise ConfigError(f"attention.blocks_folder={folder} is not allowed: there is no such folder")
    return shutil.disk_usage(folder).free


def _folder(attention: AttentionConfig) -> Path:
    return Path(attention.blocks_folder or tempfile.gettempdir())
