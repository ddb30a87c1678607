"""Under ZeRO-3 weights are cut up as they come: no rank ever holds the model, and nothing else is different."""

import os

import pytest
import torch

from longctx.models.checkpoint import inspect_checkpoint
from longctx.training.config import DeepSpeedConfig, TrainModelConfig
from longctx.training.deepspeed_engine import WeightSharder
from longctx.training.starting_model import build_starting_model
from tests.longctx.training.live_memory import LiveMemory
from tests.longctx.training.worlds import make_config, read_losses, run_world
from tests.parallel.gloo_ranks import run_ranks
from tests.tiny_checkpoints import make_checkpoint

INITS = ("checkpoint", "random")


def build(path, init, sharder):
    """The model, and the most bytes that were alive on the way."""
    config = TrainModelConfig(path=str(path), dtype="float32", init=init)
    spec = inspect_checkpoint(path)
    with LiveMemory() as memory:
        model = build_starting_model(
            spec, config, context_length=64, device=torch.device("cpu"), seed=3, sharder=sharder
        )
    return model, memory.peak_bytes


def start(rank, world_size, _, path):
    """For each way to begin: peak bytes cut up and whole, bytes of the weights, and of the largest."""
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed wants it
    sizes = {}
    for init in INITS:
        sharder = WeightSharder(DeepSpeedConfig(zero_stage=3, persistence_threshold=0), torch.float32)
        model, peak = build(path, init, sharder)
        whole, whole_peak = build(path, init, None)
        assert not any(weight.numel() for weight in model.parameters())
        assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
        for (name, weight), (other_name, other) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
            with sharder.gather([weight]):
                assert name == other_name and torch.equal(weight, other), name
        weights = [weight.nbytes for weight in whole.parameters()]
        sizes[init] = peak, whole_peak, sum(weights), max(weights)
    return sizes


@pytest.mark.slow
def test_no_rank_holds_the_model(tmp_path):
    path = make_checkpoint(tmp_path, "qwen3", num_hidden_layers=12)
    for sizes in run_ranks(start, 2, path):
        for init, (peak, _, num_bytes, largest) in sizes.items():
            assert peak < num_bytes / 2 + 3 * largest < 0.75 * num_bytes, init
        _, whole_peak, num_bytes, _ = sizes["random"]
        assert whole_peak >= num_bytes  # of a checkpoint, what safetensors maps is not counted


def losses_of(folder, stage, *overrides, model):
    output = folder / f"run-{stage}"
    parts = (f"deepspeed.zero_stage={stage}", "parallel.dp_degree=2", "train.batch_size=2", "checkpoint.export=false")
    run_world(make_config(output, *parts, "deepspeed.persistence_threshold=0", *overrides, model=model))
    return read_losses(output)


@pytest.mark.parametrize(
    "family, init",
    [("llama", "checkpoint"), pytest.param("qwen3", "random", marks=pytest.mark.slow)],  # untied, tied
)
def test_losses_do_not_depend_on_the_stage(tmp_path, init, family):
    model = make_checkpoint(tmp_path / "model", family)
    overrides = (f"model.init={init}", "optimizer.weight_decay=0.5", "optimizer.lr=1e-2", "train.mlp_tile=16")
    one, three = (losses_of(tmp_path, stage, *overrides, model=model) for stage in (1, 3))
    assert three == pytest.approx(one, rel=1e-5)
    assert abs(one[0] - one[-1]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "series"])
def test_adapters_begin_alike_under_every_stage(tmp_path, method):
    """A new one, with norms and embeddings; then one that is trained on."""
    model = make_checkpoint(tmp_path / "model", "qwen3")
    overrides = (f"peft.method={method}", "peft.train_norms=true", "peft.train_embeddings=true", "optimizer.lr=1e-2")
    one, three = (losses_of(tmp_path, stage, *overrides, "checkpoint.export=true", model=model) for stage in (1, 3))
    assert three == pytest.approx(one, rel=1e-5)
    again = tmp_path / "again"
    again.mkdir()
    overrides = (f"peft.path={tmp_path / 'run-3' / 'final'}", "optimizer.lr=1e-2")
    one, three = (losses_of(again, stage, *overrides, model=model) for stage in (1, 3))
    assert three == pytest.approx(one, rel=1e-5)
