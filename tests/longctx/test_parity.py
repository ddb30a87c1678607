"""Packed, paged decoding equals transformers' greedy generation, token for token in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.attention.registry import ATTENTION
from longctx.attention.torch_paged import TorchPagedAttention
from longctx.errors import CheckpointError
from longctx.models.checkpoint import inspect_checkpoint
from longctx.models.loading import load_model
from longctx.models.packed import PackedDecoder
from memory.pages import PagePool
from tests.longctx.greedy import (
    PAGE_SIZE,
    Sequence,
    generate_packed,
    generate_reference,
    load_decoder,
    make_batch,
    step,
)
from tests.tiny_checkpoints import make_checkpoint

NUM_NEW = 30
LENGTHS = (100, 131, 117)
LONG_FACTORS = {"short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_gqa": ("llama", {}),
    "llama_mqa": ("llama", {"num_key_value_heads": 1}),
    "llama_mha_tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_wide_heads": ("llama", {"head_dim": 32}),
    "llama_gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral_window": ("mistral", {}),
    "mistral_full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3_untied": ("qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
    "phi3": ("phi3", {}),
    "phi3_window": ("phi3", {"sliding_window": 33}),
    "phi3_partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "gemma": ("gemma", {}),
    "gemma_7b_form": ("gemma", {"head_dim": 32, "num_key_value_heads": 4}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "dynamic": (
        "llama",
        {"max_position_embeddings": 110, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    # Lengths 100, 131, 117 grow by 30: one prompt crosses from short to long factors, the others start beyond.
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 112,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG_FACTORS},
        },
    ),
    "longrope_llama": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 112,
                "factor": 4.0,
                **LONG_FACTORS,
            }
        },
    ),
}


def make_prompts(lengths: tuple[int, ...], *, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(params=["torch", "native"])
def attention(request: pytest.FixtureRequest) -> str:
    """Every attention implementation that computes float32 on a CPU."""
    reason = ATTENTION.get(request.param).unsupported(torch.device("cpu"), torch.float32, 16)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_transformers(tmp_path: Path, case: str, attention: str) -> None:
    family, overrides = CASES[case]
    path = make_checkpoint(tmp_path / "model", family, **overrides)
    prompts = make_prompts(LENGTHS)
    expected = generate_reference(path, prompts, num_new=NUM_NEW)
    assert len(set(map(tuple, expected))) == len(prompts)  # else the prompts would not matter
    decoder = load_decoder(path, attention=attention)
    assert generate_packed(decoder, prompts, num_new=NUM_NEW) == expected
    assert generate_packed(decoder, prompts, num_new=NUM_NEW, chunk_size=37) == expected


@pytest.mark.parametrize(
    ("case", "attribute"),
    [("dynamic", "length_threshold"), ("longrope_llama", "length_threshold"), ("longrope", "restart_length")],
)
def test_length_dependent_rope_matters(tmp_path: Path, case: str, attribute: str) -> None:
    """The cases above would not notice a wrong length, or a restart left out, if it changed nothing."""
    family, overrides = CASES[case]
    decoder = load_decoder(make_checkpoint(tmp_path / "model", family, **overrides))
    prompts = make_prompts(LENGTHS)
    right = generate_packed(decoder, prompts, num_new=NUM_NEW)
    setattr(decoder.rotary, attribute, None)
    assert generate_packed(decoder, prompts, num_new=NUM_NEW) != right


def test_sharded_weights_and_alone_or_together(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", "llama", max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    prompts = make_prompts((5, 64, 1))
    decoder = load_decoder(path)
    expected = generate_reference(path, prompts, num_new=10)
    assert generate_packed(decoder, prompts, num_new=10) == expected
    assert [generate_packed(decoder, [prompt], num_new=10)[0] for prompt in prompts] == expected


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_bf16_logits_are_near(tmp_path: Path, family: str) -> None:
    """bf16 weights are exact in fp32, so transformers' fp32 run is the truth that both bf16 runs approximate."""
    path = make_checkpoint(tmp_path / "model", family, dtype="bfloat16")
    assert inspect_checkpoint(path).dtype == "bfloat16"
    (prompt,) = make_prompts((120,))
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        truth = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits[0]
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)(ids).logits[0].float()
    decoder = load_decoder(path, dtype=torch.bfloat16)
    pool = PagePool(decoder.layout(PAGE_SIZE), 8)
    sequence = Sequence(prompt, pool.allocate(8) or [], rope_prompt_len=len(prompt))
    batch, _ = make_batch(pool, [sequence], [len(prompt)])
    batch.logit_rows_R = torch.arange(len(prompt))
    ours = decoder.forward(batch)
    assert ours.dtype == torch.float32 and ours.shape == truth.shape
    our_error, their_error = ((logits - truth).norm() / truth.norm() for logits in (ours, theirs))
    assert our_error < 1.2 * their_error
    assert their_error < 0.2


def test_logit_rows_are_picked(tmp_path: Path) -> None:
    """Any rows, in any order; none at all while a prompt is not finished."""
    decoder = load_decoder(make_checkpoint(tmp_path / "model", "llama"))
    pool = PagePool(decoder.layout(PAGE_SIZE), 4)
    (prompt,) = make_prompts((50,))
    sequence = Sequence(prompt, pool.allocate(4) or [], rope_prompt_len=len(prompt))
    batch, _ = make_batch(pool, [sequence], [len(prompt)])
    batch.logit_rows_R = torch.arange(50)
    every = decoder.forward(batch)
    batch.logit_rows_R = torch.tensor([49, 3])
    torch.testing.assert_close(decoder.forward(batch), every[[49, 3]])
    batch.logit_rows_R = torch.tensor([], dtype=torch.int64)
    assert decoder.forward(batch).shape == (0, decoder.spec.vocab_size)


def test_on_layer_is_called_in_order(tmp_path: Path) -> None:
    decoder = load_decoder(make_checkpoint(tmp_path / "model", "llama", num_hidden_layers=3))
    pool = PagePool(decoder.layout(PAGE_SIZE), 2)
    sequence = Sequence([1, 2, 3], pool.allocate(2) or [], rope_prompt_len=3)
    batch, _ = make_batch(pool, [sequence], [3])
    called: list[tuple[int, bool]] = []
    batch.on_layer = lambda layer_idx: called.append((layer_idx, bool(pool.views(layer_idx)[0].any())))
    decoder.forward(batch)
    assert called == [(0, True), (1, True), (2, True)]


def test_prefill_resumes_in_the_middle_of_a_page(tmp_path: Path) -> None:
    """One sequence in mid-prefill beside another that decodes: the mix continuous batching makes."""
    path = make_checkpoint(tmp_path / "model", "mistral")
    prompts = make_prompts((100, 20))
    expected = generate_reference(path, prompts, num_new=12)
    decoder = load_decoder(path)
    pool = PagePool(decoder.layout(PAGE_SIZE), 16)
    sequences = [Sequence(list(p), pool.allocate(8) or [], rope_prompt_len=len(p)) for p in prompts]
    while any(len(s.new_ids) < 12 for s in sequences):
        step(decoder, pool, [s for s in sequences if len(s.new_ids) < 12], chunk_size=21)
    assert [s.new_ids for s in sequences] == expected


def test_random_weights_are_reproducible(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", "llama", tokenizer=False)
    for file in path.glob("*.safetensors"):
        file.unlink()
    spec = inspect_checkpoint(path, require_weights=False)
    state = torch.random.get_rng_state()
    models = [
        load_model(spec, dtype=torch.float32, device=torch.device("cpu"), random_weights_seed=seed).model
        for seed in (1, 1, 2)
    ]
    first, again, other = (model.get_parameter("lm_head.weight") for model in models if model is not None)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(CheckpointError, match="weights"):
        load_model(spec, dtype=torch.float32, device=torch.device("cpu"))


def test_weights_are_released_while_packing(tmp_path: Path) -> None:
    spec = inspect_checkpoint(make_checkpoint(tmp_path / "model", "llama"))
    loaded = load_model(spec, dtype=torch.float32, device=torch.device("cpu"))
    model = loaded.model
    assert model is not None
    PackedDecoder(loaded, TorchPagedAttention())
    assert loaded.model is None
    left = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    assert left == ["model.embed_tokens.weight", "lm_head.weight"]
