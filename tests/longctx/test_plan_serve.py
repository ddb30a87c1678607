"""``longctx plan serve``: what it prints, says where something does not fit, and counts as engines do."""

import pytest

from longctx.attention.config import AttentionConfig, choose_method
from longctx.cli.main import main
from longctx.engine.build import build_engine
from longctx.engine.config import EngineConfig
from longctx.engine.context_plan import choose_contexts, find_longest
from longctx.engine.memory_plan import plan_serving_memory
from longctx.models.checkpoint import choose_context, inspect_checkpoint
from longctx.models.config import ModelConfig
from memory.pages import PagePool

MACHINE = ("machine.peak_flops=1e12", "machine.bytes_per_s=2e10", "model.dtype=bfloat16")
PLAN = ("plan", "serve", "cluster=colocated")


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main([*words, *MACHINE])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_deployment(capsys):
    code, output, _ = run(capsys, "plan", "serve", "machine.memory=4GiB", "engine.kv_bytes=256MiB")
    assert code == 0
    assert output.count("a worker holds 2 contexts of 65,536 tokens") == 2  # of 128 MiB each
    assert "a prompt of 65,536 tokens takes at least" in output
    kv = 65536 * 2048 + 2 * 3_018_496  # a sequence's KV and the weights
    assert f"65,536   1          {kv / 2e10 * 1e3:.3g}" in output


def test_a_deployment_that_is_too_large(capsys):
    words = ("plan", "serve", "machine.memory=512MiB", "engine.kv_bytes=100MiB")
    code, output, _ = run(capsys, *words)
    assert code == 1
    assert "does not fit into 0.5 GiB" in output
    (advice,) = [line for line in output.splitlines() if line.startswith("what would hold")]
    changes = advice.partition(": ")[2].split()
    assert run(capsys, *words[:3], *changes)[0] == 0


def test_everything_but_kv_is_too_large(capsys):
    code, output, _ = run(capsys, "plan", "serve", "machine.memory=256MiB")
    assert code == 1
    assert "all but KV takes" in output


def test_blocks_in_a_file_take_no_memory_but_their_landmarks(capsys):
    tiers = ("model=demo_landmark", "machine.memory=1GiB", "attention.blocks=file", "attention.blocks_bytes=4GiB")
    code, output, _ = run(capsys, *PLAN, *tiers, "engine.kv_bytes=64MiB")
    assert code == 0
    assert "and 4.0 GiB in a file" in output
    assert (
        "landmarks    0.031 GiB" in output
    )  # 32 KiB of keys and values, and 512 bytes of landmarks, a block and layer
    assert "a worker holds 1 context of 1,048,576 tokens" in output
    assert "has no limit of its own" in output
    code, output, _ = run(capsys, *PLAN, *tiers, "engine.kv_bytes=4MiB")
    assert code == 1
    assert "too little is near the compute: engine.kv_bytes=39MiB at least" in output


def test_cores_and_what_they_fetch_share_the_memory(capsys):
    words = (*PLAN, "model=demo_cca", "attention.core_fetch=4", "machine.memory=800MiB")
    code, output, _ = run(capsys, *words, "engine.kv_bytes=600MiB")
    assert code == 1
    (advice,) = [line for line in output.splitlines() if line.startswith("what would fit")]
    changes = advice.partition(": ")[2].split()
    assert [change.partition("=")[0] for change in changes] == ["engine.kv_bytes", "attention.blocks_bytes"]
    code, output, _ = run(capsys, *words, *changes)
    assert code == 0
    assert "context of 65,536 tokens" in output or "contexts of 65,536 tokens" in output


def test_ranks_do_not_lengthen_contexts_of_cores(capsys):
    words = (*PLAN, "model=demo_cca", "machine.memory=440MiB", "engine.kv_bytes=2MiB")
    code, output, _ = run(capsys, *words)
    assert code == 1
    assert "sp_degree" not in output
    assert "model.max_context=" not in output  # nothing is left for contexts


@pytest.mark.parametrize(
    ("model", "attention"),
    [
        ("demo", AttentionConfig()),
        ("demo_landmark", AttentionConfig()),
        ("demo_landmark", AttentionConfig(blocks="host", blocks_bytes="24MiB")),
        ("demo_cca", AttentionConfig()),
        ("demo_cca", AttentionConfig(core_fetch=2, blocks_bytes="24MiB")),
    ],
)
def test_an_engine_has_the_room_that_is_planned(model, attention):
    config = ModelConfig(path=model, dtype="bfloat16")
    engine_config = EngineConfig(kv_bytes="8MiB", max_batch_tokens=512, max_sequences=4)
    engine = build_engine(config, engine_config, attention=attention)
    spec = inspect_checkpoint(config.path)
    contexts = choose_contexts(
        spec,
        choose_method(attention, spec),
        engine_config,
        attention,
        dtype="bfloat16",
        device_type="cpu",
        sp_degree=1,
    )
    max_context = choose_context(spec, None)
    plan = plan_serving_memory(
        spec,
        engine_config,
        attention,
        contexts,
        dtype="bfloat16",
        device_type="cpu",
        memory_bytes=2**30,
        max_context=max_context,
    )
    near = engine.pool if isinstance(engine.pool, PagePool) else engine.pool.near
    assert near.storage.nbytes == plan.parts["kv"]
    longest = min(max_context, find_longest(contexts, plan.room))
    assert longest - contexts.layout.page_size < engine.max_context <= longest
