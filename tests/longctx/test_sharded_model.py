"""A model that is filled module by module is the one that transformers loads, and refuses what that refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longctx.errors import CheckpointError
from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.loading import build_model, read_transformers_config
from tests.tiny_checkpoints import FAMILIES, make_checkpoint

CPU = torch.device("cpu")
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
EMBEDDING, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"
Tensors = dict[str, torch.Tensor]


class Recorder:
    """A sharder that leaves weights whole."""

    def __init__(self, *, is_source: bool = True) -> None:
        self.is_source = is_source
        self.sizes: list[int] = []

    def shard(self, module: torch.nn.Module) -> None:
        self.sizes.append(sum(weight.numel() for weight in module.parameters(recurse=False)))


def build(path: Path, sharder: Recorder | None = None, *, dtype: torch.dtype = torch.float32, seed: int | None = None):
    spec = inspect_checkpoint(path)
    config = read_transformers_config(spec)
    return build_model(spec, config, dtype=dtype, device=CPU, random_weights_seed=seed, sharder=sharder)


def check_equal(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        tensors, others = dict(getattr(found, kind)()), dict(getattr(wanted, kind)())
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name
            assert tensor.requires_grad == others[name].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_transformers_loads(tmp_path, family, dtype):
    rope: dict[str, Any] = {"rope_parameters": ROPE} if family == "llama" else {}
    path = make_checkpoint(tmp_path, family, tokenizer=False, max_shard_size="100KB", **rope)
    check_equal(build(path, recorder := Recorder(), dtype=dtype), build(path, dtype=dtype))
    assert sum(recorder.sizes) == inspect_checkpoint(path).num_parameters


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_drawn_weights_are_the_same_cut_up_or_not(tmp_path, family):
    path = make_checkpoint(tmp_path, family, tokenizer=False)
    state = torch.random.get_rng_state()
    check_equal(build(path, Recorder(), seed=1), build(path, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_ranks_have_the_buffers(tmp_path):
    path = make_checkpoint(tmp_path, "gemma", tokenizer=False)
    whole = dict(build(path).named_buffers())
    for seed in (None, 1):
        found = dict(build(path, Recorder(is_source=False), seed=seed).named_buffers())
        assert all(torch.equal(found[name], buffer) for name, buffer in whole.items())


def leave_out(tensors: Tensors) -> None:
    del tensors["model.norm.weight"]


def add_bias(tensors: Tensors) -> None:
    tensors[BIAS] = torch.ones(64)


def add_old_buffer(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)


def store_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def store_other_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING] + 1


def cut_norm(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.ones(32)


def spoil(path: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def load_changed(path: Path, change: Callable[[Tensors], None], sharder: Recorder | None):
    spec = inspect_checkpoint(path)
    spoil(path, change)  # after it was looked at: what that finds never comes so far
    return build_model(spec, read_transformers_config(spec), dtype=torch.float32, device=CPU, sharder=sharder)


@pytest.mark.parametrize("change", [leave_out, add_bias])
def test_what_is_refused_is_named_as_without_sharding(tmp_path, change):
    messages = []
    for sharder in (None, Recorder(), Recorder(is_source=False)):
        path = make_checkpoint(tmp_path / "model", "qwen3", tokenizer=False)
        with pytest.raises(CheckpointError, match=r"1 (missing|unexpected) keys: model\.") as caught:
            load_changed(path, change, sharder)
        messages.append(str(caught.value))
    assert len(set(messages)) == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [(cut_norm, r"1 mismatched keys: model\.norm\.weight"), (store_other_head, r"tie_word_embeddings must be false")],
)
def test_what_else_is_refused(tmp_path, change, match):
    path = make_checkpoint(tmp_path, "qwen3", tokenizer=False)
    with pytest.raises(CheckpointError, match=match):
        load_changed(path, change, Recorder())


@pytest.mark.parametrize("change", [add_old_buffer, store_head])
def test_what_transformers_overlooks(tmp_path, change):
    path = make_checkpoint(tmp_path, "qwen3", tokenizer=False)
    whole = build(path)
    check_equal(load_changed(path, change, Recorder()), whole)
    check_equal(build(path), whole)
