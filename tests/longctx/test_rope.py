"""Rotary tables equal transformers' rotary modules bit for bit, for every scaling type, packed or not."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longctx.errors import CheckpointError
from longctx.models.rope import RotaryTable
from longctx.models.rope_config import count_context, read_rope

FACTORS = {"short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {"rope_type": "default"}),
    "partial": ("phi3", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    "linear": ("llama", {"rope_type": "linear", "factor": 3.0}),
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 2.0}),
    "yarn": ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "yarn_tuned": (
        "qwen3",
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
            "truncate": False,
        },
    ),
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "longrope": ("phi3", {"rope_type": "longrope", **FACTORS}),
    "longrope_factor": (
        "llama",
        {"rope_type": "longrope", "factor": 5.0, "original_max_position_embeddings": 90, **FACTORS},
    ),
}


def make_config(name: str) -> Any:
    family, params = TYPES[name]
    fields = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "head_dim": 16,
        "intermediate_size": 32,
        "vocab_size": 16,
        "pad_token_id": None,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_theta": 10000.0, **params},
    }
    if family == "phi3":
        fields["original_max_position_embeddings"] = 90
    return AutoConfig.for_model(family, **fields)


def reference(config: Any, positions: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a fresh transformers rotary module gives to one sequence of ``length`` tokens, at ``positions`` of it."""
    module = AutoModelForCausalLM.from_config(config).model.rotary_emb
    cos, sin = module(torch.zeros(1), torch.arange(length)[None])
    return cos[0, positions], sin[0, positions]


@pytest.mark.parametrize("name", TYPES)
def test_equals_transformers(name: str) -> None:
    """Three sequences, one of them beyond every threshold, packed into one lookup."""
    config = make_config(name)
    table = RotaryTable(config)
    lengths = (50, 100, 300)
    picks = [torch.tensor([0, 1, 49]), torch.tensor([99, 3, 64]), torch.tensor([0, 127, 200, 299])]
    expected = [reference(config, pick, length) for pick, length in zip(picks, lengths, strict=True)]
    rope_lens = torch.cat([torch.full_like(pick, length) for pick, length in zip(picks, lengths, strict=True)])
    cos, sin = table.lookup(torch.cat(picks), rope_lens)
    assert cos.dtype == torch.float32 and cos.shape == (10, table.dim)
    # Vector and scalar cosine may differ in the last bit, depending on where a value lies in memory.
    torch.testing.assert_close(cos, torch.cat([pair[0] for pair in expected]), rtol=0, atol=2e-7)
    torch.testing.assert_close(sin, torch.cat([pair[1] for pair in expected]), rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", TYPES)
def test_length_matters_only_where_it_says_so(name: str) -> None:
    table = RotaryTable(make_config(name))
    positions = torch.arange(40)
    short = table.lookup(positions, torch.full_like(positions, 40))
    long = table.lookup(positions, torch.full_like(positions, 1000))
    assert torch.equal(short[0], long[0]) != table.depends_on_length
    if not table.depends_on_length:
        assert torch.equal(table.lookup(positions)[0], short[0])
        return
    assert table.length_threshold is not None
    at_threshold = table.lookup(positions, torch.full_like(positions, table.length_threshold))
    beyond = table.lookup(positions, torch.full_like(positions, table.length_threshold + 1))
    assert torch.equal(at_threshold[0], short[0]) and not torch.equal(beyond[0], short[0])


def test_only_phi3_restarts() -> None:
    restarts = {name: RotaryTable(make_config(name)).restart_length for name in TYPES}
    assert restarts == {name: 90 if name == "longrope" else None for name in TYPES}


def test_growing_keeps_values() -> None:
    table = RotaryTable(make_config("default"))
    positions = torch.tensor([0, 17, 4095])
    before = table.lookup(positions)
    with pytest.raises(IndexError):
        table.lookup(torch.tensor([70000]))
    table.reserve(70001)
    after = table.lookup(positions)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    cos, _ = table.lookup(torch.tensor([70000]))
    assert cos[0, 0].item() == pytest.approx(math.cos(70000.0), abs=1e-6)  # dimension 0 has frequency 1


BASE = {"model_type": "llama", "head_dim": 16, "max_position_embeddings": 128}
SPELLINGS: dict[str, tuple[dict[str, Any], int]] = {
    "none": ({"rope_theta": 5000.0}, 128),
    "old_linear": ({"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}, 512),
    "old_dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 256),
    "new_default": ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 128),
    "yarn_without_original": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 512),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}, 128),
    "llama3": (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        128,
    ),
    "phi3_longrope": (
        {"model_type": "phi3", "original_max_position_embeddings": 40, "rope_scaling": {"type": "longrope", **FACTORS}},
        128,
    ),
    "phi3_partial": (
        {"model_type": "phi3", "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75},
        128,
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_read_as_transformers_does(name: str) -> None:
    fields, max_context = SPELLINGS[name]
    fields = BASE | fields
    params = read_rope(Path("folder"), fields)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "pad_token_id": None}
    given = {key: value for key, value in fields.items() if key != "model_type"}
    config = AutoConfig.for_model(fields["model_type"], **sizes, **given)
    RotaryTable(config)  # transformers fills in original_max_position_embeddings of old spellings on first use
    theirs = {key: value for key, value in config.rope_parameters.items() if key != "type"}
    if theirs.get("partial_rotary_factor") == 1.0:
        params.setdefault("partial_rotary_factor", 1.0)
    assert params == theirs
    assert count_context(params, 128) == max_context


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"rope_scaling": {"type": "mystery"}}, "rope type 'mystery' is not supported; supported are default"),
        ({"rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}}, "not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor=-1 is not allowed"),
        ({"rope_theta": "big"}, "rope_theta='big' is not allowed"),
        ({"partial_rotary_factor": 0.5}, "supported for phi3 only"),
        ({"rope_scaling": {"type": "longrope", **FACTORS, "short_factor": [1.0]}}, "short_factor must be a list of 8"),
    ],
)
def test_refusals(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_rope(Path("folder"), BASE | fields)
