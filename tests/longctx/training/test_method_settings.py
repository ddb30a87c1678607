"""Which attention a run trains, what is refused, and what becomes of vocabulary, export and adapters by it."""

import dataclasses

import pytest
import torch

from longctx.adapters.adapter import adapter_state, add_adapter, save_adapter
from longctx.adapters.config import PeftConfig
from longctx.adapters.folder import choose_adapter
from longctx.errors import CheckpointError, ConfigError
from longctx.models.attention_spec import CCASpec, LandmarkSpec
from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.tokenizer import load_tokenizer
from longctx.training.attention_choice import describe_attention, place_landmark_token, settle_attention
from longctx.training.config import TrainAttentionConfig, TrainModelConfig
from longctx.training.starting_model import build_starting_model
from tests.longctx.test_sharded_model import Recorder
from tests.longctx.training.worlds import change, make_config, read_losses, run_world
from tests.tiny_checkpoints import make_checkpoint

DEMO = inspect_checkpoint("demo")
BASES = {
    "dense": DEMO,
    "landmark": dataclasses.replace(DEMO, attention=LandmarkSpec(15, 259)),
    "cca": dataclasses.replace(DEMO, attention=CCASpec(8, 64, "mean", "query")),
    "windows": dataclasses.replace(DEMO, sliding_windows=(None, 48, None, 48)),
}
CPU = torch.device("cpu")


def settle(base: str, *, peft: str = "none", context_length: int = 2048, **fields) -> TrainAttentionConfig:
    config = TrainAttentionConfig(**fields)
    return settle_attention(config, BASES[base], context_length=context_length, peft=PeftConfig(method=peft))


@pytest.mark.parametrize(
    ("base", "fields", "expected"),
    [
        ("dense", {}, None),
        ("windows", {}, None),
        ("dense", {"name": "sf"}, None),
        ("dense", {"name": "landmark"}, LandmarkSpec(63, 260)),
        ("dense", {"name": "cca"}, CCASpec(16, 1024)),
        ("landmark", {}, LandmarkSpec(15, 260)),
        ("landmark", {"peft": "lora"}, LandmarkSpec(15, 260)),
        ("cca", {}, CCASpec(8, 64, "mean", "query")),
        ("cca", {"window": 100, "core_position": "last"}, CCASpec(8, 100, "last", "query")),
        ("dense", {"name": "cca", "peft": "lora", "group_size": 4}, CCASpec(4, 1024)),
    ],
)
def test_what_is_not_configured_is_the_checkpoints(base, fields, expected):
    assert describe_attention(settle(base, **fields), 260) == expected


@pytest.mark.parametrize(
    ("base", "fields", "words"),
    [
        ("landmark", {"name": "dense"}, "trained with landmark attention; landmark or auto"),
        ("landmark", {"name": "cca"}, "attention.name=cca is not allowed"),
        ("landmark", {"block_size": 31}, "was trained with blocks of 15 tokens"),
        ("cca", {"name": "landmark"}, "trained with cca attention; cca or auto"),
        ("dense", {"block_size": 7}, "block_size=7 is not allowed with attention.name=dense: it is landmark's"),
        ("dense", {"name": "landmark", "group_size": 7}, "it is sf or cca's"),
        ("dense", {"name": "landmark", "peft": "lora"}, "its embedding would not be trained"),
        ("dense", {"name": "landmark", "block_size": 99, "context_length": 100}, "at most 98"),
        ("dense", {"name": "cca", "group_size": 9, "window": 8}, "at most as long as the window"),
        ("dense", {"name": "cca", "context_length": 1039}, "train.context_length=1039: together at most that"),
        ("windows", {"name": "cca"}, "has sliding windows of 48 tokens; dense"),
        ("windows", {"name": "landmark"}, "has sliding windows of 48 tokens; dense"),
        ("dense", {"name": "sf", "sink_tokens": 1025}, "at most half of attention.group_size, 1024"),
    ],
)
def test_what_makes_no_sense_is_refused(base, fields, words):
    with pytest.raises(ConfigError, match=words):
        settle(base, **fields)


def test_the_landmark_token_takes_a_row_that_no_text_uses(tmp_path):
    has_token = load_tokenizer(DEMO).has_token
    assert place_landmark_token(DEMO, has_token=has_token) == (260, 261)
    assert place_landmark_token(dataclasses.replace(DEMO, vocab_size=300), has_token=has_token) == (299, 300)
    assert place_landmark_token(BASES["landmark"], has_token=has_token) == (259, 260)


@pytest.mark.parametrize("sharder", [None, Recorder()], ids=["whole", "sharded"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_new_row_is_the_mean_of_the_others(tmp_path, family, sharder):
    before = inspect_checkpoint(make_checkpoint(tmp_path, family, tokenizer=False))
    spec = dataclasses.replace(before, vocab_size=261, attention=LandmarkSpec(15, 260))
    config = TrainModelConfig(dtype="bfloat16")
    grown, model = (
        build_starting_model(each, config, context_length=64, device=CPU, seed=0, sharder=sharder)
        for each in (spec, before)
    )
    assert grown.config.longctx_attention == {"name": "landmark", "block_size": 15, "landmark_token_id": 260}
    for name, weight in grown.named_parameters():
        stored = model.get_parameter(name)
        if weight.shape != stored.shape:
            assert weight.shape[0] == 261 and name in ("model.embed_tokens.weight", "lm_head.weight")
            mean = stored.detach().float().mean(0)
            assert torch.allclose(weight[-1].detach().float(), mean, rtol=1e-2, atol=2e-3)
            weight = weight[:-1]
        assert torch.equal(weight, stored), name


def test_an_adapter_says_which_attention_it_was_trained_with(tmp_path):
    spec = dataclasses.replace(DEMO, attention=CCASpec(8, 64))
    model = build_starting_model(spec, TrainModelConfig(dtype="float32"), context_length=64, device=CPU, seed=0)
    add_adapter(model, PeftConfig(method="lora"))
    save_adapter(adapter_state(model), model, tmp_path)
    for base in (DEMO, spec, BASES["cca"]):
        assert choose_adapter(str(tmp_path), base)[0].attention == CCASpec(8, 64)
    with pytest.raises(CheckpointError, match="it was trained with CCASpec"):
        choose_adapter(str(tmp_path), BASES["landmark"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["landmark", "cca"])
def test_ranks_train_export_and_go_on(tmp_path, name):
    sizes = {"landmark": ["attention.block_size=7"], "cca": ["attention.group_size=4", "attention.window=12"]}[name]
    config = make_config(tmp_path / "one", f"attention={name}", *sizes, "train.num_steps=2")
    run_world(config)
    shared = dataclasses.replace(change(config, "parallel", sp_degree=2), output=str(tmp_path / "two"))
    report = run_world(change(shared, "deepspeed", zero_stage=3))
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), rel=1e-4)
    spec = inspect_checkpoint(report["final"])
    assert spec.attention is not None and spec.attention.name == name
    assert spec.vocab_size == (261 if name == "landmark" else 260)
    further = make_config(tmp_path / "further", "train.num_steps=1", model=report["final"])
    assert inspect_checkpoint(run_world(further)["final"]).attention == spec.attention
