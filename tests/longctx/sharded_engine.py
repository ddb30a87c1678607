"""An engine whose ranks are threads of this process over gloo, for tests."""

import threading
from contextlib import contextmanager

from longctx.engine.build import build_engine, build_rank
from longctx.engine.config import EngineConfig
from longctx.models.config import ModelConfig
from longctx.shards.group import ShardGroup
from longctx.shards.plans import PlanChoice
from longctx.shards.runner import follow_on_thread
from parallel.gloo_group import GlooGroup, open_meeting

LOOPBACK = "127.0.0.1"
TIMEOUT_S = 60.0


@contextmanager
def sharded_engine(
    folder, world_size, *, plan="auto", method=None, timeout_s=TIMEOUT_S, ends_well=True, ships=False, **options
):
    """Rank 0's engine; the others follow until the block ends. ``engine.lose_rank`` ends one as a dead process does.

    ``engine.parts`` are the ranks.
    """
    model_options = {name: options.pop(name) for name in ("attention", "max_context", "adapter") if name in options}
    model_config = ModelConfig(path=str(folder), device="cpu", **model_options)
    config = EngineConfig(**({"num_threads": 1, "max_sequences": 16, "kv_bytes": "4MiB"} | options))
    meeting = open_meeting(LOOPBACK, timeout_s=timeout_s)
    ends, threads, failures, groups, parts = [], [], [], {}, {}

    def make_shards(rank):
        place = meeting if rank == 0 else (LOOPBACK, meeting.port)
        group = GlooGroup(rank, world_size, meeting=place, address=LOOPBACK, timeout_s=timeout_s)
        groups[rank] = group
        return ShardGroup(group, "here", PlanChoice(plan), timeout_s)

    def start(rank):
        try:
            shards = make_shards(rank)
            part = parts[rank] = build_rank(model_config, config, shards, attention=method)
            threads.append(
                follow_on_thread(part, shards.group, timeout_s=timeout_s, on_end=ends.append, name=f"rank-{rank}")
            )
        except Exception as error:
            failures.append(error)

    starters = [threading.Thread(target=start, args=(rank,)) for rank in range(1, world_size)]
    for starter in starters:
        starter.start()
    engine = build_engine(model_config, config, attention=method, shards=make_shards(0), ships=ships)
    for starter in starters:
        starter.join()
    assert not failures, failures
    engine.parts = [engine.runner._rank, *(parts[rank] for rank in range(1, world_size))]
    engine.lose_rank = lambda rank: groups[rank].close()
    try:
        yield engine
    finally:
        engine.close()
        for thread in threads:
            thread.join(TIMEOUT_S)
    assert not ends_well or ends == [""] * (world_size - 1), ends
