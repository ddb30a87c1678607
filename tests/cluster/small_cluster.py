"""Prefill workers, decode workers and their router over tiny checkpoints: everything real but Ray.

The workers live in this process. Those of ``tests/cluster/worker_process.py`` have one of their own, to be killed.
"""

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig, DecodeConfig, PrefillConfig, ServeConfig
from cluster.delta_buffer import merge_deltas
from cluster.handle import LocalHandle, WorkerHandle
from cluster.rank_worker import RankWorker
from cluster.router import Router
from cluster.serving import describe_model
from cluster.serving_worker import ServingWorker
from longctx.engine.build import build_engine
from longctx.engine.config import EngineConfig
from longctx.messages import EngineStats, GenerationRequest, OutputDelta
from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.config import ModelConfig
from longctx.models.tokenizer import load_tokenizer
from memory.config import TransportConfig
from tests.longctx.engines import check_pages, run

TRANSPORTS = ("tcp", "shared_memory")
WAIT_S = 60.0  # longer than anything here takes


def make_config(
    folder: Path,
    *,
    transport: str = "tcp",
    num_prefill: int = 1,
    num_decode: int = 1,
    prefill_ranks: int = 1,
    decode_ranks: int = 1,
    prefill_plan: str = "auto",
    prefill_own: dict[str, Any] | None = None,
    decode_own: dict[str, Any] | None = None,
    **options: Any,
) -> ServeConfig:
    """A deployment that ships every prompt; ``options`` are fields of any group."""

    def fill(group: Any, **defaults: Any) -> Any:
        names = {field.name for field in dataclasses.fields(group)} & options.keys()
        return group(**(defaults | {name: options.pop(name) for name in names}))

    config = ServeConfig(
        model=fill(ModelConfig, path=str(folder), device="cpu", attention="torch"),
        engine=fill(EngineConfig, kv_bytes="4MiB", page_size=16, num_threads=1, max_sequences=16, max_batch_tokens=64),
        transport=fill(
            TransportConfig,
            name=transport,
            host="127.0.0.1",
            frame_bytes="16KiB",
            lease_ttl_s=4.0,
            connect_timeout_s=1.0,
            send_timeout_s=2.0,
        ),
        cluster=fill(
            ClusterConfig,
            num_prefill_workers=num_prefill,
            num_decode_workers=num_decode,
            prefill=PrefillConfig(prefill_ranks, prefill_plan, **(prefill_own or {})),
            decode=DecodeConfig(decode_ranks, **(decode_own or {})),
            local_prefill_tokens=0,
            worker_timeout_s=2.0,
            recovery_timeout_s=0.0,
        ),
    )
    assert not options, f"no such fields: {options}"
    return config


def make_prompt(seed: int, length: int) -> list[int]:
    """Random token ids."""
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def generate_alone(config: ServeConfig, requests: Sequence[GenerationRequest]) -> list[list[OutputDelta]]:
    """What one engine generates for each request: one delta a sequence. Nothing is shared between requests."""
    attention = dataclasses.replace(config.attention, blocks="near", blocks_bytes="auto")
    engine_config = dataclasses.replace(config.engine, prefix_cache=False, kv_bytes="4MiB")
    engine = build_engine(config.model, engine_config, attention=attention)
    outcomes = []
    for request in requests:
        engine.add(request)
        outcomes.append(join(run(engine)))
    return outcomes


def join(deltas: Sequence[OutputDelta]) -> list[OutputDelta]:
    """One delta for each sequence, by index; cached tokens, which depend on what ran before, are left out."""
    merged = sorted(merge_deltas(list(deltas)), key=lambda delta: delta.index)
    return [dataclasses.replace(delta, num_cached_tokens=0) for delta in merged]


class SmallCluster:
    """A router and its workers; ``workers`` has those of this process, by name, ``ranks`` their other ranks."""

    def __init__(
        self, config: ServeConfig, workers: dict[str, ServingWorker], ranks: dict[str, list[RankWorker]], router: Router
    ) -> None:
        self.config, self.workers, self.ranks, self.router = config, workers, ranks, router

    async def generate(self, request: GenerationRequest) -> list[OutputDelta]:
        """Every delta of a request, as it came."""
        async with asyncio.timeout(WAIT_S):
            return [delta async for deltas in self.router.submit(request) for delta in deltas]

    async def answer(self, request: GenerationRequest) -> list[OutputDelta]:
        """What came in all: one delta for each sequence."""
        return join(await self.generate(request))

    async def answer_twice(self, requests: Sequence[GenerationRequest]) -> tuple[list[list[OutputDelta]], ...]:
        """Answers one after another, and then to all at once, whose prefixes are known."""
        answers = [await self.answer(request) for request in requests]
        again = [dataclasses.replace(request, request_id=f"again-{request.request_id}") for request in requests]
        return answers, await asyncio.gather(*map(self.answer, again))

    async def stats(self, name: str) -> EngineStats:
        """The engine's, now."""
        worker = self.workers[name]
        await worker.on_engine(check_pages, worker.engine)
        return await worker.on_engine(worker.engine.stats)

    def num_shipped(self, name: str = "prefill-0") -> int:
        """KV bytes that a prefill worker sent."""
        worker = self.workers[name]
        worker._note_stats()
        return worker._stats.bytes_shipped

    async def wait_until_ready(self) -> None:
        """Every worker is, and has said how many pages it has."""

        async def is_ready() -> bool:
            stats = await self.router.worker_stats()
            return all(each.alive and each.engine.num_pages for each in stats)

        await wait_until(is_ready)

    async def wait_until_free(self, timeout_s: float = 2.0) -> None:
        """No page is in use, no sequence runs or waits, no lease is live at any worker of this process."""

        async def is_free() -> bool:
            stats = [await self.stats(name) for name in self.workers]
            leases = sum(
                receiver.num_leases
                for worker in self.workers.values()
                for receivers in (
                    worker.decode_side.receivers,
                    *(rank._receivers for rank in self.ranks[worker.name]),
                )
                for receiver in receivers.values()
            )
            held = [(s.num_pages_used, s.num_running, s.num_waiting, s.details["num_reserved"]) for s in stats]
            return not leases and all(counts == (0, 0, 0, 0) for counts in held)

        await wait_until(is_free, timeout_s)


@asynccontextmanager
async def start_cluster(config: ServeConfig, *others: WorkerHandle, waits: bool = True) -> AsyncIterator[SmallCluster]:
    """A cluster; in the end no page of its workers may be in use.

    Args:
        config: of the deployment.
        others: workers that are not to be made here.
        waits: until all of them are ready.
    """
    handles = {handle.name: handle for handle in others}
    here = [(name, role) for name, role in worker_names(config) if name not in handles]
    ranks = {name: make_ranks(name, role, config) for name, role in here}
    workers = {
        name: ServingWorker(name, role, config, ranks=list(map(LocalHandle, ranks[name]))) for name, role in here
    }
    handles |= {name: LocalHandle(worker) for name, worker in workers.items()}
    spec = inspect_checkpoint(config.model.path)
    router = Router(
        [handles[name] for name, _ in worker_names(config)],
        config,
        model=describe_model(spec, config.model),
        tokenizer=load_tokenizer(spec),
    )
    cluster = SmallCluster(config, workers, ranks, router)
    await router.start()
    try:
        if waits:
            await cluster.wait_until_ready()
        yield cluster
        await cluster.wait_until_free()
    finally:
        await router.stop()
        for worker in workers.values():
            await worker.close()


def make_ranks(name: str, role: str, config: ServeConfig) -> list[RankWorker]:
    """The ranks of a worker, but for rank 0."""
    degree = config.cluster.group_of(role).sp_degree
    return [RankWorker(f"{name}.{rank}", role, config) for rank in range(1, degree)]


def worker_names(config: ServeConfig) -> list[tuple[str, str]]:
    """(Name, role) of a deployment's workers."""
    counts = {"prefill": config.cluster.num_prefill_workers, "decode": config.cluster.num_decode_workers}
    return [(f"{role}-{idx}", role) for role, count in counts.items() for idx in range(count)]


async def wait_until(condition: Callable[[], Any], timeout_s: float = WAIT_S) -> None:
    """Until ``condition``, a function or a coroutine function, says so."""
    async with asyncio.timeout(timeout_s):
        while True:
            result = condition()
            if await result if asyncio.iscoroutine(result) else result:
                return
            await asyncio.sleep(0.005)
