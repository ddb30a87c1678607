"""What is read from a checkpoint folder equals what transformers reads; what cannot be served is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from longctx.errors import CheckpointError
from longctx.models.attention_spec import CCASpec, LandmarkSpec, read_attention, write_attention
from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.loading import load_model
from tests.tiny_checkpoints import FAMILIES, make_checkpoint

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama", "llama", max_shard_size="40KB")


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A sharded checkpoint to spoil: links to a good one."""
    copy = tmp_path / "spoiled"
    copy.mkdir()
    for file in llama.iterdir():
        (copy / file.name).symlink_to(file)
    return copy


def edit(path: Path, **changes: Any) -> None:
    """Write ``path`` anew with some JSON fields changed; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.unlink()
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("family", FAMILIES)
def test_spec_equals_transformers(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(tmp_path / "My-Model", family, dtype="bfloat16", max_shard_size="40KB")
    spec, config = inspect_checkpoint(path), AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert (spec.name, spec.family, spec.dtype, spec.path) == ("My-Model", family, "bfloat16", path.resolve())
    assert spec.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (spec.num_layers, spec.hidden_size, spec.num_heads) == (2, 64, 4)
    assert spec.num_kv_heads == config.num_key_value_heads
    assert spec.head_dim == model.model.layers[0].self_attn.head_dim == 16
    assert (spec.vocab_size, spec.max_context) == (260, 1024)
    assert spec.sliding_windows == ((48, 48) if family == "mistral" else (None, None))
    assert spec.tie_word_embeddings == config.tie_word_embeddings
    assert spec.eos_token_ids == {256}


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_fields_take_the_defaults_of_transformers(tmp_path: Path, family: str) -> None:
    """A config.json with nothing but sizes; the weights transformers would make for it are the ones expected."""
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": family, "pad_token_id": None}))
    spec, config = inspect_checkpoint(tmp_path, require_weights=False), AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert spec.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    attention = model.model.layers[0].self_attn
    assert (spec.head_dim, spec.num_kv_heads) == (attention.head_dim, config.num_key_value_heads)
    assert spec.max_context == config.max_position_embeddings
    assert spec.sliding_windows == (getattr(config, "sliding_window", None),) * 2
    assert spec.rope_parameters["rope_theta"] == config.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("overrides", "windows"),
    [
        ({}, (None, None, None)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, (None, None, 8)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (8, None, 8),
        ),
    ],
)
def test_windows_of_qwen(tmp_path: Path, overrides: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    path = make_checkpoint(tmp_path, "qwen2", num_hidden_layers=3, tokenizer=False, **overrides)
    assert inspect_checkpoint(path).sliding_windows == windows


def test_generation_config_is_read(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[7, 258], temperature=0.6, top_p=0.9, top_k=20)
    spec = inspect_checkpoint(folder)
    assert spec.eos_token_ids == {7, 256, 258}
    assert (spec.sampling.temperature, spec.sampling.top_p, spec.sampling.top_k) == (0.6, 0.9, 20)
    assert spec.sampling.repetition_penalty is None
    (folder / "generation_config.json").unlink()
    assert inspect_checkpoint(folder).eos_token_ids == {256}


def test_demo_is_the_shipped_model() -> None:
    spec = inspect_checkpoint("demo")
    assert (spec.name, spec.family, spec.vocab_size) == ("demo", "qwen3", 260)
    assert spec.eos_token_ids == {256, 258}


def test_inspecting_loads_no_torch() -> None:
    code = (
        "import sys; from longctx.models.checkpoint import inspect_checkpoint; inspect_checkpoint('demo');"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are llama, mistral"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "num_local_experts: mixture-of-experts"),
        ({"vision_config": {}}, "vision_config: multimodal"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantization_config \(awq\): quantised"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "must be LlamaForCausalLM"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh' is not supported; allowed: silu"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"hidden_size": "64"}, "hidden_size='64' is not allowed; must be an integer above 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not allowed"),
        ({"vocab_size": None}, "config.json has no vocab_size"),
        ({"eos_token_id": "end"}, "eos_token_id='end' is not allowed"),
        ({"num_hidden_layers": 3}, r"tensors are missing: model.layers.2.self_attn.q_proj.weight, .*, \.\.\."),
        ({"vocab_size": 300}, r"model.embed_tokens.weight has shape \(260, 64\); config.json says \(300, 64\)"),
        ({"rope_parameters": {"rope_type": "mystery"}}, "rope type 'mystery'"),
    ],
)
def test_config_refusals(folder: Path, changes: dict[str, Any], match: str) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=match) as caught:
        inspect_checkpoint(folder)
    assert str(folder) in str(caught.value)


LANDMARK = {"name": "landmark", "block_size": 15, "landmark_token_id": 259}
CCA = {"name": "cca", "group_size": 16, "window": 64}


def test_attention_is_read_and_written(folder: Path) -> None:
    assert inspect_checkpoint(folder).attention is None
    for entry, spec in ((LANDMARK, LandmarkSpec(15, 259)), (CCA, CCASpec(16, 64))):
        edit(folder / "config.json", longctx_attention=entry)
        assert inspect_checkpoint(folder).attention == spec
        assert read_attention(folder, {"vocab_size": 260} | write_attention(spec)) == spec
        assert AutoConfig.from_pretrained(folder).longctx_attention == entry  # transformers passes it on
    assert write_attention(None) == {}


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ("landmark", "landmark, cca"),
        ({"name": "mamba"}, "landmark, cca"),
        (LANDMARK | {"block_size": 0}, "block_size=0 .* at least 1"),
        (LANDMARK | {"block_size": True}, "block_size=True .* at least 1"),
        (LANDMARK | {"landmark_token_id": 260}, "below vocab_size, 260"),
        (LANDMARK | {"top_k": 4}, "its keys are block_size, landmark_token_id"),
        ({"name": "landmark", "block_size": 15}, "its keys are block_size, landmark_token_id"),
        (CCA | {"window": "64"}, "window='64' .* at least 1"),
        (CCA | {"core_position": "first"}, "core_position='first' .* last, middle, mean"),
    ],
)
def test_attention_refusals(folder: Path, entry: Any, match: str) -> None:
    edit(folder / "config.json", longctx_attention=entry)
    with pytest.raises(CheckpointError, match=match):
        inspect_checkpoint(folder)


def remove_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def truncate_shard(folder: Path) -> None:
    shard = min(folder.glob("model-*.safetensors"))
    replace(shard, shard.read_bytes()[:-100])


def shorten_shard_to_nothing(folder: Path) -> None:
    replace(min(folder.glob("model-*.safetensors")), b"\x01")


def leave_lfs_pointer(folder: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    replace(min(folder.glob("model-*.safetensors")), pointer)


def garble_header(folder: Path) -> None:
    shard = min(folder.glob("model-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[8:12] = b"????"
    replace(shard, bytes(content))


def misplace_tensor(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weight_map = index["weight_map"] | {"lm_head.weight": index["weight_map"]["model.norm.weight"]}
    if weight_map == index["weight_map"]:
        weight_map["lm_head.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    edit(folder / "model.safetensors.index.json", weight_map=weight_map)


def empty_index(folder: Path) -> None:
    replace(folder / "model.safetensors.index.json", b"{}")


def only_pickle(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def only_gguf(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "model.gguf").write_bytes(b"")


def no_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def break_config(folder: Path) -> None:
    replace(folder / "config.json", b'{"model_type": ')


def list_config(folder: Path) -> None:
    replace(folder / "config.json", b"[1]")


def binary_config(folder: Path) -> None:
    replace(folder / "config.json", b"\xff\xfe\x00")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def eight_bit_tensor(folder: Path) -> None:
    for shard in folder.glob("model-*.safetensors"):
        tensors = load_file(shard)
        shard.unlink()
        save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, shard)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (remove_shard, r"1 of \d+ weight files are missing: model-00002-of-"),
        (truncate_shard, r"model-00001-of-\d+.safetensors is damaged: \d+ bytes, its header says \d+"),
        (shorten_shard_to_nothing, "is cut short or no safetensors file"),
        (leave_lfs_pointer, "Git LFS pointer"),
        (garble_header, "has no valid safetensors header"),
        (misplace_tensor, "says that lm_head.weight is in"),
        (empty_index, "has no weight_map"),
        (only_pickle, r"pytorch_model.bin.*only safetensors is allowed.*save_pretrained"),
        (only_gguf, "GGUF"),
        (no_weights, "no weights: neither model.safetensors nor"),
        (break_config, "config.json is not valid JSON"),
        (list_config, "config.json holds a JSON list"),
        (binary_config, "config.json is not valid JSON"),
        (no_config, "config.json is missing, so this is no Hugging Face checkpoint"),
        (adapter, "PEFT adapter"),
        (eight_bit_tensor, "is stored as I8; allowed: F32, BF16, F16"),
    ],
)
def test_file_refusals(folder: Path, spoil: Callable[[Path], None], match: str) -> None:
    inspect_checkpoint(folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=match) as caught:
        inspect_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no such folder; model\.path is demo or a Hugging Face checkpoint folder"
    ):
        inspect_checkpoint(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        inspect_checkpoint(tmp_path / "file")


def test_left_over_tensors_are_refused_at_load(tmp_path: Path) -> None:
    """A bias that the configuration does not announce would be dropped silently."""
    path = make_checkpoint(tmp_path, "llama", tokenizer=False)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected keys: model.layers.0.self_attn.q_proj.bias"):
        load_model(inspect_checkpoint(path), dtype=torch.float32, device=torch.device("cpu"))


def test_threads_load_at_once(tmp_path: Path) -> None:
    """transformers patches its classes while it loads; two at once would untie the weights of all later models."""
    spec = inspect_checkpoint(make_checkpoint(tmp_path / "tied", "qwen3"))
    assert spec.tie_word_embeddings

    def load(_: int) -> bool:
        model = load_model(spec, dtype=torch.float32, device=torch.device("cpu")).model
        assert model is not None
        return model.get_output_embeddings().weight is model.get_input_embeddings().weight

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(load, range(12)))
    assert load(0)
