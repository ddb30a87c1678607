"""Adapters on transformers models: what is trained, what is written, and who can read it."""

import json
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from longctx.adapters.adapter import adapter_state, add_adapter, load_adapter, save_adapter
from longctx.adapters.config import METHODS as METHOD_NAMES
from longctx.adapters.registry import ADAPTERS
from longctx.errors import ConfigError
from longctx.models.checkpoint import inspect_checkpoint
from longctx.training.model_sizes import count_sizes
from tests.longctx.adapters.adapted_models import (
    FAMILIES,
    INPUT_IDS,
    METHODS,
    load_base,
    logits_of,
    make_adapter,
    make_config,
    randomise,
)
from tests.tiny_checkpoints import make_checkpoint

MORE = {"train_norms": True, "train_embeddings": True}
KINDS = {
    "lora": ("lora_A", "lora_B"),
    "dora": ("lora_A", "lora_B", "lora_magnitude_vector"),
    "series": ("adapter.down", "adapter.up"),
    "parallel": ("adapter.down", "adapter.up"),
}


def test_names_equal_the_registry():
    assert sorted(METHOD_NAMES) == sorted(["none", *ADAPTERS])
    assert sorted(METHODS) == list(ADAPTERS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(tmp_path, family, method):
    model = load_base(make_checkpoint(tmp_path, family))
    before, base = logits_of(model), {name: p.clone() for name, p in model.state_dict().items()}
    assert add_adapter(model, make_config(method)) is model
    assert torch.allclose(logits_of(model), before, atol=1e-4)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert all(any(f".{kind}." in name for kind in KINDS[method]) for name, _ in trained)
    num_layers = 2 * (4 if family == "phi3" else 7) if method in ("lora", "dora") else 2 * 2
    assert len(trained) == num_layers * len(KINDS[method])

    optimizer = torch.optim.AdamW([p for _, p in trained], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(INPUT_IDS, labels=INPUT_IDS, use_cache=False).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, base[name.replace(".base_layer.", ".")]), name


@pytest.mark.parametrize("method", METHODS)
def test_norms_and_embeddings_are_trained_where_they_are(tmp_path, method):
    model = add_adapter(load_base(make_checkpoint(tmp_path, "qwen3")), make_config(method, **MORE))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    wanted = {f"model.layers.{idx}.{norm}.weight" for idx in range(2) for norm in norms}
    wanted |= {"model.norm.weight", "model.embed_tokens.weight"}
    assert {name for name in trained if not any(kind in name for kind in KINDS[method])} == wanted
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("method", METHODS)
def test_parameters_have_the_dtype_of_the_base(tmp_path, method):
    model = load_base(make_checkpoint(tmp_path, "llama")).to(torch.bfloat16)
    add_adapter(model, make_config(method))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("more", [{}, MORE], ids=["alone", "more"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_is_written(tmp_path, family, method, more):
    base, folder, model = make_adapter(tmp_path, family, method, **more)
    theirs = PeftModel.from_pretrained(load_base(base), folder)
    assert torch.allclose(logits_of(theirs), logits_of(model), atol=1e-4, rtol=1e-5)
    assert not torch.allclose(logits_of(load_base(base)), logits_of(model), atol=0.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_trained_on(tmp_path, family, method):
    base, folder, model = make_adapter(tmp_path, family, method, **MORE)
    again = load_adapter(load_base(base), folder)
    assert torch.equal(logits_of(again), logits_of(model))
    names = [[name for name, p in each.named_parameters() if p.requires_grad] for each in (model, again)]
    assert names[0] == names[1]
    by_config = add_adapter(load_base(base), make_config("lora", path=str(folder)))
    assert torch.equal(logits_of(by_config), logits_of(model))
    randomise(again, seed=1)
    save_adapter(adapter_state(again), again, tmp_path / "second")
    assert torch.equal(logits_of(load_adapter(load_base(base), tmp_path / "second")), logits_of(again))
    first, second = (json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "second"))
    assert first == second


def test_state_is_gathered_parameter_by_parameter(tmp_path):
    _, folder, model = make_adapter(tmp_path, "llama", "dora", **MORE)
    whole = {id(p): p.data for p in model.parameters()}
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = parameter.data.new_empty(0)  # as ZeRO 3 leaves it
    gathered = []

    @contextmanager
    def gather(parameters):
        (parameter,) = parameters
        gathered.append(tuple(parameter.ds_shape))
        parameter.data = whole[id(parameter)]
        yield
        parameter.data = parameter.data.new_empty(0)

    state = adapter_state(model, gather)
    stored = load_file(folder / "adapter_model.safetensors")
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert gathered == [tuple(tensor.shape) for tensor in state.values()]
    save_adapter(state, model, tmp_path / "second")
    assert load_file(tmp_path / "second" / "adapter_model.safetensors").keys() == stored.keys()


@pytest.mark.parametrize(
    ("family", "targets", "words"),
    [
        ("llama", ["q_proj", "query"], ["query matches no linear layer", "q_proj, k_proj, v_proj, o_proj, gate_proj"]),
        (
            "phi3",
            ["q_proj", "o_proj"],
            ["q_proj matches no", "o_proj, qkv_proj, gate_up_proj, down_proj", "all-linear"],
        ),
        ("llama", ["lm_head"], ["lm_head matches no"]),
        ("llama", [], ["an empty list matches no"]),
    ],
)
def test_targets_that_match_nothing_are_named(tmp_path, family, targets, words):
    model = load_base(make_checkpoint(tmp_path, family))
    with pytest.raises(ConfigError) as caught:
        add_adapter(model, make_config("lora", target_modules=targets))
    for word in ["peft.target_modules", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_the_same_adapter_and_disturbs_no_other_numbers(tmp_path, method):
    folder = make_checkpoint(tmp_path, "llama")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, again, other = (
        adapter_state(add_adapter(load_base(folder), make_config(method), seed=seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    "options", [{}, {"train_norms": True}, {"train_embeddings": True}, {"sublayers": "mlp"}], ids=str
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_planner_counts_what_is_trained(tmp_path, family, method, options):
    folder, config = make_checkpoint(tmp_path, family), make_config(method, **options)
    model = add_adapter(load_base(folder), config)
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_sizes(inspect_checkpoint(folder), config).num_trained == num_trained
