"""Adapters that are served: logits of the adapted transformers model, and clear words where they do not fit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from longctx.adapters.adapter import adapter_state, add_adapter, load_adapter, save_adapter
from longctx.adapters.folder import choose_adapter
from longctx.attention.registry import choose_attention
from longctx.engine.config import EngineConfig
from longctx.errors import CheckpointError
from longctx.llm import LLM
from longctx.messages import SamplingParams
from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.config import ModelConfig
from longctx.models.loading import load_model
from longctx.models.packed import PackedDecoder
from memory.pages import PagePool
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
from tests.longctx.engines import collect, make_request
from tests.longctx.greedy import Sequence, make_batch
from tests.longctx.sharded_engine import sharded_engine
from tests.tiny_checkpoints import make_checkpoint

CPU = torch.device("cpu")
MORE = {"train_norms": True, "train_embeddings": True}


def load_decoder(base, adapter, attention="torch") -> PackedDecoder:
    spec, chosen = choose_adapter(str(adapter), inspect_checkpoint(base))
    loaded = load_model(spec, dtype=torch.float32, device=CPU, adapter=chosen)
    return PackedDecoder(loaded, choose_attention(attention, CPU, torch.float32, spec.head_dim))


def packed_logits(decoder: PackedDecoder) -> torch.Tensor:
    """Of every position, but for the first half, which an earlier step has computed."""
    layout = decoder.layout(16)
    num_tokens = INPUT_IDS.shape[1]
    pool = PagePool(layout, layout.num_pages(num_tokens))
    sequence = Sequence(INPUT_IDS[0].tolist(), pool.allocate(layout.num_pages(num_tokens)), rope_prompt_len=num_tokens)
    half = num_tokens // 2
    decoder.forward(make_batch(pool, [sequence], [half])[0])
    sequence.num_computed = half
    batch, _ = make_batch(pool, [sequence], [num_tokens - half])
    return decoder.forward(replace(batch, logit_rows_R=torch.arange(num_tokens - half)))


@pytest.mark.parametrize("more", [{}, MORE], ids=["alone", "more"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_adapted_model(tmp_path, family, method, more):
    base, adapter, model = make_adapter(tmp_path, family, method, **more)
    found, wanted = packed_logits(load_decoder(base, adapter)), logits_of(model)[20:]
    assert (found - wanted).norm() / wanted.norm() < 4e-5
    assert (wanted - logits_of(load_base(base))[20:]).norm() / wanted.norm() > 0.1


@pytest.mark.parametrize("options", [{"sublayers": "attention"}, {"sublayers": "mlp", "activation": "relu"}])
@pytest.mark.parametrize("method", ["series", "parallel"])
def test_one_sublayer_has_an_adapter(tmp_path, method, options):
    base, adapter, model = make_adapter(tmp_path, "llama", method, **options)
    found, wanted = packed_logits(load_decoder(base, adapter)), logits_of(model)[20:]
    assert (found - wanted).norm() / wanted.norm() < 4e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_the_rope_it_was_trained_with_is_served(tmp_path, method, rope):
    base = make_checkpoint(tmp_path / "base", "llama")
    config = AutoConfig.from_pretrained(base)
    config.rope_parameters = {"rope_theta": 10000.0, "original_max_position_embeddings": 1024} | rope
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32).eval()
    add_adapter(model, make_config(method))
    randomise(model)
    save_adapter(adapter_state(model), model, tmp_path / "adapter")
    found, wanted = packed_logits(load_decoder(base, tmp_path / "adapter")), logits_of(model)[20:]
    assert (found - wanted).norm() / wanted.norm() < 4e-5
    unstretched = logits_of(load_adapter(load_base(base), tmp_path / "adapter"))[20:]
    assert (unstretched - wanted).norm() / wanted.norm() > 0.01
    spec, _ = choose_adapter(str(tmp_path / "adapter"), inspect_checkpoint(base))
    assert (spec.max_context, spec.rope_type) == (4096, rope["rope_type"])
    (tmp_path / "adapter" / "rope.json").write_text('{"rope_parameters": {"rope_type": "odd"}}')
    with pytest.raises(CheckpointError, match=r"rope\.json: max_position_embeddings=None"):
        choose_adapter(str(tmp_path / "adapter"), inspect_checkpoint(base))


def test_foreign_scales_are_as_peft_has_them(tmp_path):
    base, adapter, _ = make_adapter(tmp_path, "llama", "lora")
    path = adapter / "adapter_config.json"
    more = {
        "auto_mapping": None,
        "use_rslora": True,
        "alpha_pattern": {"layers.1.self_attn.q_proj": 5.0, "down_proj": 3.0},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    found, wanted = packed_logits(load_decoder(base, adapter)), logits_of(load_adapter(load_base(base), adapter))[20:]
    assert (found - wanted).norm() / wanted.norm() < 4e-5


@pytest.mark.parametrize("method", METHODS)
def test_text_and_ranks(tmp_path, method):
    base, adapter, model = make_adapter(tmp_path, "llama", method)
    prompt = INPUT_IDS[0].tolist()
    generated = model.generate(INPUT_IDS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = generated[0, len(prompt) :].tolist()
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    config = ModelConfig(path=str(base), adapter=str(adapter), device="cpu")
    with LLM(model_config=config, engine_config=EngineConfig(kv_bytes="4MiB", num_threads=1)) as llm:
        assert list(llm.generate(prompt, params)[0].outputs[0].token_ids) == expected
    with sharded_engine(base, 2, adapter=str(adapter)) as engine:
        engine.add(make_request("a", prompt, params))
        deltas = []
        while engine.has_work:
            deltas += engine.step()
        assert collect(deltas)["a", 0] == expected


def spoil_config(**fields):
    def spoil(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def spoil_tensors(change):
    def spoil(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return spoil


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda folder: (folder / "adapter_config.json").unlink(),
            ["adapter_config.json is missing: no"],
        ),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors is missing"]),
        (cut, ["adapter_model.safetensors is damaged"]),
        (spoil_config(peft_type="IA3"), ["'IA3' is not supported", "LORA", "SERIES_ADAPTER"]),
        (spoil_config(use_dora=True), ["down_proj lacks lora_magnitude_vector of its dora adapter"]),
        (spoil_config(bias="all"), ["bias='all' is not supported"]),
        (spoil_config(init_lora_weights="pissa"), ["init_lora_weights='pissa'"]),
        (spoil_config(layer_replication=[[0, 1]]), ["layer_replication"]),
        (spoil_tensors(lambda tensors: tensors.pop(FIRST)), ["layers.0.self_attn.q_proj lacks lora_A"]),
        (spoil_tensors(lambda tensors: tensors.update({FIRST: tensors[FIRST].int()})), ["stored as I32", "BF16"]),
        (
            spoil_tensors(lambda tensors: tensors.update({"base_model.model.model.odd.weight": torch.ones(2)})),
            ["model.odd.weight belongs to no layer of base (llama)", "q_proj"],
        ),
    ],
)
def test_folders_that_cannot_be_used_are_refused(tmp_path, spoil, words):
    base, adapter, _ = make_adapter(tmp_path, "llama", "lora")
    spoil(adapter)
    with pytest.raises(CheckpointError) as caught:
        choose_adapter(str(adapter), inspect_checkpoint(base))
    for word in [str(adapter), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("family", "shape", "words"),
    [
        ("llama", {"num_hidden_layers": 1}, ["layers.1", "belongs to no layer of", "other (llama)"]),
        ("llama", {"num_hidden_layers": 3}, ["layers 2 of", "other (llama)", "a model of 2 layers"]),
        ("llama", {"hidden_size": 80}, ["has shape", "other (llama)", "another size"]),
        ("phi3", {}, ["trained on a LlamaForCausalLM", "other (phi3)", "Phi3ForCausalLM"]),
    ],
)
def test_another_base_is_refused(tmp_path, method, family, shape, words):
    _, adapter, _ = make_adapter(tmp_path, "llama", method)
    other = make_checkpoint(tmp_path / "other", family, **shape)
    for refuse in (
        lambda: choose_adapter(str(adapter), inspect_checkpoint(other)),
        lambda: load_adapter(load_base(other), adapter),
    ):
        with pytest.raises(CheckpointError) as caught:
            refuse()
        for word in words:
            assert word in str(caught.value)


def test_a_model_is_no_adapter(tmp_path):
    base = make_checkpoint(tmp_path / "base", "llama")
    with pytest.raises(CheckpointError, match=r"it is a model \(config\.json\), no adapter"):
        choose_adapter(str(base), inspect_checkpoint(base))
    with pytest.raises(CheckpointError, match="no such folder"):
        choose_adapter(str(tmp_path / "absent"), inspect_checkpoint(base))
