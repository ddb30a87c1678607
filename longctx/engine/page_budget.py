"""How many pages of KV fit into the memory there is."""

import contextlib
import logging
import os
from pathlib import Path

import psutil
import torch

from longctx.engine.config import KV_SHARES, EngineConfig
from longctx.errors import ConfigError
from memory.layout import KVLayout
from parallel.option import parse_budget

logger = logging.getLogger(__name__)

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_USAGE = Path("/sys/fs/cgroup/memory.current")


def count_pages(
    config: EngineConfig,
    layout: KVLayout,
    device: torch.device,
    *,
    context_pages: int,
    is_wanted: bool,
    world_size: int,
    num_sharing: int,
    num_tabled: int = 0,
) -> int:
    """Pages within this rank's KV budget, and never more than its share of ``max_sequences`` full contexts.

    Args:
        config: the budget.
        layout: of a page.
        device: where pages are.
        context_pages: of a full context.
        is_wanted: somebody counts on a full context, and is to be told if it does not fit.
        world_size: ranks that share sequences.
        num_sharing: ranks on this machine.
        num_tabled: landmarks' keys that a table beside the pages has for each page.

    Raises:
        ConfigError: if the budget holds no page, or is more than there is.
    """
    budget = parse_budget(config.kv_bytes)
    is_auto = budget is None
    if budget is None:
        share = KV_SHARES[device.type] / (num_sharing if device.type == "cpu" else 1)
        budget = available_bytes(device, share=share)
    elif device.type == "cpu" and budget > available_bytes(device, share=1.0):
        raise ConfigError(
            f"engine.kv_bytes={config.kv_bytes} is not allowed: "
            f"{available_bytes(device, share=1.0) / 2**30:.1f} GiB of memory are available"
        )
    page_bytes = layout.page_bytes + num_tabled * layout.num_layers * layout.landmark_bytes
    num_pages = budget // page_bytes
    if num_pages < 1:
        raise ConfigError(
            f"engine.kv_bytes={config.kv_bytes!r} is not allowed: {budget} bytes do not hold one page of "
            f"{page_bytes} bytes ({layout.page_size} tokens, all layers)"
        )
    if is_auto:
        num_pages = min(num_pages, -(-config.max_sequences * context_pages // world_size))
    if is_wanted and num_pages * world_size < context_pages:
        logger.warning(
            "engine.kv_bytes=%s holds %d pages of %d tokens; the model's context needs %d and is cut to what they hold",
            config.kv_bytes,
            num_pages * world_size,
            layout.page_size,
            context_pages,
        )
    return num_pages


def count_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_bytes(device: torch.device, *, share: float) -> int:
    """``share`` of what is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * share)
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        # A container may have less than the machine.
        available = min(available, int(CGROUP_LIMIT.read_text()) - int(CGROUP_USAGE.read_text()))
    return int(max(available, 0) * share)
