"""From the ``model`` and ``engine`` groups of the configuration to an engine."""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from longctx.attention.backend import AttentionBackend
from longctx.attention.registry import choose_attention
from longctx.engine.config import EngineConfig, parse_budget
from longctx.engine.engine import Engine
from longctx.errors import ConfigError
from longctx.models.checkpoint import ModelSpec, choose_context, inspect_checkpoint
from longctx.models.config import ModelConfig
from longctx.models.loading import load_model
from longctx.models.packed import PackedDecoder
from longctx.models.tokenizer import load_tokenizer
from memory.layout import KVLayout
from memory.pages import DTYPES, PagePool

logger = logging.getLogger(__name__)

MakePool = Callable[[KVLayout, int], PagePool]

CPU_MEMORY_SHARE = 0.3  # of what is available; several workers may share the machine
GPU_MEMORY_SHARE = 0.8  # of what is free after the weights; the rest is for activations and graphs
DEFAULT_PAGE_SIZE = 16  # for attention that takes any
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_USAGE = Path("/sys/fs/cgroup/memory.current")


def build_engine(
    model_config: ModelConfig,
    engine_config: EngineConfig,
    *,
    make_pool: MakePool | None = None,
    random_weights_seed: int | None = None,
) -> Engine:
    """Load a model and make an engine for it.

    Args:
        model_config: which checkpoint, and how it runs.
        engine_config: pages, batches and queues.
        make_pool: makes the page pool from a layout and a number of pages, where its storage is not plain memory.
        random_weights_seed: make the weights up (benchmarks).

    Raises:
        CheckpointError: the checkpoint cannot be served.
        ConfigError: naming the key, its value and what is allowed.
    """
    spec = inspect_checkpoint(model_config.path, require_weights=random_weights_seed is None)
    device = choose_device(model_config.device)
    dtype = choose_dtype(model_config.dtype, spec, device)
    max_context = choose_context(spec, model_config.max_context)
    backend = _choose_attention(model_config.attention, spec, device=device, dtype=dtype)
    page_size = _choose_page_size(engine_config.page_size, backend)
    tokenizer = load_tokenizer(spec, model_config.chat_template)
    if device.type == "cpu":
        torch.set_num_threads(engine_config.num_threads or _count_cores())
    loaded = load_model(spec, dtype=dtype, device=device, random_weights_seed=random_weights_seed)
    decoder = PackedDecoder(loaded, backend)
    decoder.rotary.reserve(max_context)
    layout = decoder.layout(page_size)
    num_pages = _count_pages(engine_config, layout, device, max_context=max_context)
    pool = make_pool(layout, num_pages) if make_pool is not None else PagePool(layout, num_pages, device=device)
    engine = Engine(decoder, pool, tokenizer=tokenizer, config=engine_config, max_context=max_context)
    logger.info(
        "%s: %s on %s, attention %s, %d pages of %d tokens (%.0f MiB), context %d tokens",
        spec.name,
        str(dtype).removeprefix("torch."),
        device,
        backend.name,
        num_pages,
        page_size,
        num_pages * layout.page_bytes / 2**20,
        engine.max_context,
    )
    return engine


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
        return choose_attention(name, device, dtype, spec.head_dim)
    except ValueError as error:
        raise ConfigError(f"model.attention={name!r} is not allowed: {error}") from error


def _choose_page_size(page_size: int | None, backend: AttentionBackend) -> int:
    if page_size is None:
        return backend.page_sizes[0] if backend.page_sizes else DEFAULT_PAGE_SIZE
    if backend.page_sizes and page_size not in backend.page_sizes:
        sizes = ", ".join(str(size) for size in sorted(backend.page_sizes))
        raise ConfigError(f"engine.page_size={page_size} is not allowed: attention {backend.name} takes {sizes}")
    return page_size


def _count_pages(config: EngineConfig, layout: KVLayout, device: torch.device, *, max_context: int) -> int:
    """Pages within the KV budget, and never more than ``max_sequences`` full contexts fill."""
    budget = parse_budget(config.kv_bytes)
    is_auto = budget is None
    if budget is None:
        share = CPU_MEMORY_SHARE if device.type == "cpu" else GPU_MEMORY_SHARE
        budget = _available_bytes(device, share=share)
    elif device.type == "cpu" and budget > _available_bytes(device, share=1.0):
        raise ConfigError(
            f"engine.kv_bytes={config.kv_bytes} is not allowed: "
            f"{_available_bytes(device, share=1.0) / 2**30:.1f} GiB of memory are available"
        )
    num_pages = budget // layout.page_bytes
    if num_pages < 1:
        raise ConfigError(
            f"engine.kv_bytes={config.kv_bytes!r} is not allowed: {budget} bytes do not hold one page of "
            f"{layout.page_bytes} bytes ({layout.page_size} tokens, all layers)"
        )
    if is_auto:
        num_pages = min(num_pages, config.max_sequences * layout.num_pages(max_context))
    if num_pages * layout.page_size < max_context:
        logger.warning(
            "engine.kv_bytes=%s holds %d tokens; the model's context of %d is cut to that",
            config.kv_bytes,
            num_pages * layout.page_size,
            max_context,
        )
    return num_pages


def _count_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _available_bytes(device: torch.device, *, share: float) -> int:
    """``share`` of what is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * share)
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        # A container may have less than the machine.
        available = min(available, int(CGROUP_LIMIT.read_text()) - int(CGROUP_USAGE.read_text()))
    return int(max(available, 0) * share)
