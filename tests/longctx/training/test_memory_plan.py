"""The memory plan: what saves memory does, by the bytes that a hand count gives; a run's own peak is near it."""

import threading
from dataclasses import replace

import pytest

from longctx.models.checkpoint import inspect_checkpoint
from longctx.training.activation_memory import count_layer
from longctx.training.config import TrainConfig
from longctx.training.launch import launch_locally
from longctx.training.memory_plan import PARTS, plan_memory
from longctx.training.model_sizes import count_sizes
from longctx.training.sinks.metrics_file import read_metrics
from longctx.training.time_plan import plan_attention, plan_time
from parallel.links import LinkModel
from tests.longctx.training.changes import change

DEMO = inspect_checkpoint("demo")
LONG = change(TrainConfig(), "train.context_length=16384", "model.dtype=float32")


def plan(config, device_type="cpu"):
    return plan_memory(DEMO, config, plan_attention(DEMO, config, LinkModel()), device_type=device_type)


def test_sizes_of_the_demo():
    sizes = count_sizes(DEMO, LONG.peft)
    assert sizes.num_trained == sizes.num_weights == DEMO.num_parameters
    assert sizes.largest_trained == 704 * 256
    lora = count_sizes(DEMO, replace(LONG.peft, method="lora", rank=8))
    assert lora.num_trained == 4 * 8 * (2 * (256 + 256) + 2 * (256 + 128))
    assert lora.num_frozen == DEMO.num_parameters


def test_kept_activations_are_the_layers_inputs_and_attentions_outputs():
    assert plan(LONG).moment == "backward"
    shorter = plan(change(LONG, "train.keep_attention=false"))
    outputs = 16384 * (4 * 64 * 4 + 4 * 4)  # one layer's, with the log-sum-exp
    saved = plan(LONG).parts["activations"] - shorter.parts["activations"]
    assert saved == 3 * outputs  # the fourth layer's is there in its backward anyway


def test_weights_and_optimizer_by_stage():
    num_weights = DEMO.num_parameters
    two_ranks = change(LONG, "parallel.dp_degree=2", "train.batch_size=2")
    for stage, num_optimizer in ((0, 8), (1, 6), (2, 6), (3, 6)):
        parts = plan(change(two_ranks, f"deepspeed.zero_stage={stage}")).parts
        assert parts["optimizer"] == pytest.approx(num_optimizer * num_weights, rel=1e-6)
        if stage < 3:
            assert parts["weights"] == 4 * num_weights


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("train.activation_checkpointing=false", "train.activation_checkpointing=true"),
        ("train.mlp_tile=0", "train.mlp_tile=1024"),
        ("model.dtype=float32", "model.dtype=bfloat16"),
        ("peft.method=none", "peft.method=lora"),
        ("train.activation_offload=false", "train.activation_offload=true"),
        ("parallel.sp_degree=1", "parallel.sp_degree=2"),
        ("parallel.sp_degree=2", "parallel.sp_degree=4"),
        ("train.context_length=16384", "train.context_length=8192"),
    ],
)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_what_saves_memory(before, after, device_type):
    assert plan(change(LONG, after), device_type).total < plan(change(LONG, before), device_type).total


@pytest.mark.parametrize(
    ("overrides", "num_hidden", "num_inner"),
    [
        (("peft.method=lora",), 3, 1),  # the MLP's linear layers save nothing, nor do norms what their weights multiply
        (("peft.method=lora", "peft.train_norms=true"), 1, 1),
        (("peft.method=lora", "peft.target_modules=[all-linear]"), 2, 0),
        (("peft.method=lora", "peft.target_modules=[down_proj]"), 4, 0),
        (("peft.method=parallel",), 2, 1),
        (("peft.method=parallel", "peft.sublayers=mlp"), 3, 1),
        (("peft.method=series",), 2, 1),
    ],
)
def test_frozen_layers_save_less(overrides, num_hidden, num_inner):
    def count_kept(*changes):
        config = change(LONG, "train.activation_checkpointing=false", "train.mlp_tile=0", *changes)
        return count_layer(DEMO, config, plan_attention(DEMO, config, LinkModel()), rank=0, device_type="cpu").kept

    hidden, inner = (16384 * size * 4 for size in (DEMO.hidden_size, DEMO.intermediate_size))
    assert count_kept() - count_kept(*overrides) == num_hidden * hidden + num_inner * inner


def test_a_tiled_loss_has_less_than_all_logits():
    whole = change(LONG, "train.loss_tile=0", "train.mlp_tile=512")
    tiled = change(whole, "train.loss_tile=1024")
    assert plan(tiled).total <= plan(whole).total
    assert set(plan(whole).parts) == set(PARTS)


def test_offload_moves_to_the_host():
    config = change(LONG, "model.dtype=bfloat16", "deepspeed.offload_optimizer=true")
    assert plan(config, "cuda").parts["optimizer"] == 0
    assert plan(config, "cuda").host_bytes > 12 * DEMO.num_parameters


def test_time_is_the_sum_of_its_parts_and_ranks_share_it():
    def plan_seconds(config):
        return plan_time(
            DEMO, config, LinkModel(flops_per_s=1e11), peak_flops=1e11, bytes_per_s=1e10, device_type="cpu"
        )

    one, two = plan_seconds(LONG), plan_seconds(change(LONG, "parallel.sp_degree=2"))
    assert one.exchange == one.sharding == 0.0
    assert two.exchange + two.sharding > 0.0
    assert two.products == pytest.approx(one.products / 2)
    assert two.attention == pytest.approx(one.attention / 2, rel=0.01)
    assert one.flops == two.flops
    assert 0.0 < two.communication_share < 1.0
    assert one.tokens_per_s == pytest.approx(16384 / one.total)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [("train.context_length=4096",), ("train.context_length=8192", "parallel.sp_degree=2")]
)
def test_a_runs_peak_is_within_a_tenth(tmp_path, overrides):
    (tmp_path / "rows.txt").write_text("x" * 40_000)
    config = change(
        TrainConfig(output=str(tmp_path / "run")),
        f"data.path={tmp_path / 'rows.txt'}",
        "train.num_steps=2",
        "train.num_threads=1",
        "checkpoint.export=false",
        "logger.peak_flops=1e11",
        "model.dtype=float32",
        *overrides,
    )
    launch_locally(config, stop=threading.Event())
    measured = max(read_metrics(tmp_path / "run")[-1].memory_bytes)
    assert plan(config).total == pytest.approx(measured, rel=0.1)
