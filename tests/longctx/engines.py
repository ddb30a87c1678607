"""Engines over tiny checkpoints, and how tests drive them."""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from longctx.attention.config import AttentionConfig
from longctx.engine.build import build_engine
from longctx.engine.config import EngineConfig
from longctx.engine.engine import Engine
from longctx.messages import GenerationRequest, OutputDelta, SamplingParams
from longctx.models.config import ModelConfig

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
MAX_STEPS = 20_000
DEVICE = os.environ.get("LONGCTX_TEST_DEVICE", "cpu")  # test_gpu_engine.py runs these tests on a GPU
COMPILED = "native" if DEVICE == "cpu" else "triton"  # attention there that is not plain torch


def make_engine(
    folder: Path,
    *,
    num_pages: int | None = None,
    method: AttentionConfig | None = None,
    ships: bool = False,
    **options: Any,
) -> Engine:
    """An engine on ``DEVICE``; ``num_pages`` limits the pool, the rest are fields of either configuration."""
    model_options = {name: options.pop(name) for name in ("attention", "dtype", "max_context") if name in options}
    model_config = ModelConfig(path=str(folder), device=DEVICE, **model_options)
    options = {"num_threads": 1, "max_sequences": 16, "kv_bytes": "4MiB"} | options
    if num_pages is not None:
        probe = build_engine(model_config, EngineConfig(**options), attention=method)
        options["kv_bytes"] = str(num_pages * probe.pool.layout.page_bytes)
    return build_engine(model_config, EngineConfig(**options), attention=method, ships=ships)


def make_request(
    request_id: str, prompt: list[int], params: SamplingParams = GREEDY, **fields: str
) -> GenerationRequest:
    return GenerationRequest(request_id, tuple(prompt), params, **fields)


def check_pages(engine: Engine) -> None:
    """Every page is used, cached or free, and none is two of these."""
    pool, cache = engine.pool, engine.cache
    held = sum(count > 0 for count in pool.refcounts)
    assert held == cache.num_used
    assert held + cache.num_idle + pool.num_free == pool.num_pages


def run(engine: Engine, *, max_steps: int = MAX_STEPS) -> list[OutputDelta]:
    """Step until nothing is left; all deltas."""
    deltas: list[OutputDelta] = []
    for _ in range(max_steps):
        if not engine.has_work:
            return deltas
        deltas += engine.step()
        check_pages(engine)
    raise AssertionError(f"still working after {max_steps} steps")


def collect(deltas: list[OutputDelta]) -> dict[tuple[str, int], list[int]]:
    """Token ids by request and index."""
    token_ids: dict[tuple[str, int], list[int]] = defaultdict(list)
    for delta in deltas:
        token_ids[delta.request_id, delta.index] += delta.token_ids
    return dict(token_ids)


def generate(engine: Engine, requests: list[GenerationRequest]) -> dict[tuple[str, int], list[int]]:
    """Token ids of all requests, added together; the pages must all be free afterwards."""
    for request in requests:
        engine.add(request)
    token_ids = collect(run(engine))
    assert engine.stats().num_pages_used == 0
    return token_ids


class CopyingExport:
    """Copies each announced block from one pool to the other, as a transport would."""

    def __init__(self, source, target, reservation):
        self.source, self.target, self.reservation = source, target, reservation
        self.announced, self.first, self.failure = [], None, None

    def on_layer(self, layer_idx, first_page_idx, pages):
        for page_idx, page in enumerate(pages, start=first_page_idx):
            self.announced.append((layer_idx, page_idx))
            skipped = self.reservation.first_page_idx
            if page_idx >= skipped:
                target = self.reservation.pages[page_idx - skipped]
                self.target.block(layer_idx, target).copy_(self.source.block(layer_idx, page))

    def on_prefilled(self, first):
        self.first = first

    def on_failed(self, reason):
        self.failure = reason


def hand_over(prefill, decode, request):
    """Reserve at ``decode``, export from ``prefill``; the export and its request's later deltas."""
    reservation = decode.reserve(request)
    assert reservation is not None
    export = CopyingExport(prefill.shipped_pool, decode.shipped_pool, reservation)
    prefill.add(request, export=export)
    return export
