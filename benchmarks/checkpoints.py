"""Random-weight Llama checkpoints for benchmarks, written once into a cache folder.

The tokenizer has one token per embedding row: 256 bytes, so that any text encodes, then words that only decode. Neither
it nor the configuration names an end-of-sequence token.
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

FIRST_WORD_ID = 256  # ids below are bytes; benchmarks draw prompts from the words above
INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama decoder's sizes, and what one token costs it."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int = 32000
    tied: bool = True  # the output head is the embedding
    max_context: int = 65536

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one decoder layer: name to (out_features, in_features)."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q_size, self.hidden_size),
            "self_attn.k_proj": (kv_size, self.hidden_size),
            "self_attn.v_proj": (kv_size, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, q_size),
            "mlp.gate_proj": (self.mlp_size, self.hidden_size),
            "mlp.up_proj": (self.mlp_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.mlp_size),
        }

    @property
    def num_linear_weights(self) -> int:
        """Weights of all layers' linears, without the output head."""
        return self.num_layers * sum(rows * columns for rows, columns in self.linears.values())

    @property
    def num_head_weights(self) -> int:
        """Weights of the output head."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All weights; a tied embedding counts once."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return self.num_linear_weights + norms + self.num_head_weights * (1 if self.tied else 2)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of bf16 keys and values of one token, all layers."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def prefill_flops(self, num_tokens: int) -> float:
        """Floating-point operations of one causal prompt; the output head runs for its last token only."""
        linear = 2 * num_tokens * self.num_linear_weights + 2 * self.num_head_weights
        pairs = num_tokens * (num_tokens + 1) / 2  # of a query and a key it sees
        attention = 2 * 2 * pairs * self.num_layers * self.num_heads * self.head_dim
        return linear + attention

    def decode_bytes(self, context_tokens: int, *, num_streams: int = 1) -> float:
        """Bytes a bf16 decode step must read: every weight once, and each stream's KV."""
        weights = 2 * (self.num_linear_weights + self.num_head_weights)
        return weights + num_streams * context_tokens * self.kv_bytes_per_token


SHAPES = {
    "tiny": Shape(
        hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, mlp_size=704, vocab_size=8192
    ),
    "22m": Shape(
        hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64, mlp_size=1408, vocab_size=8192
    ),
    "110m": Shape(hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=4, head_dim=64, mlp_size=3072),
    "450m": Shape(hidden_size=1280, num_layers=24, num_heads=20, num_kv_heads=5, head_dim=64, mlp_size=3328),
    "8b": Shape(
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_size=14336,
        vocab_size=128256,
        tied=False,
    ),
}


def ensure_checkpoint(name: str, work: Path, *, with_weights: bool = True, max_context: int | None = None) -> Path:
    """The folder of the checkpoint ``name`` under ``work``, written if it is not there yet.

    Args:
        name: a key of ``SHAPES``.
        work: cache folder, made if missing.
        with_weights: without: for a model whose weights are made where it runs.
        max_context: tokens, if not the shape's own.
    """
    shape = SHAPES[name] if max_context is None else replace(SHAPES[name], max_context=max_context)
    folder = work / f"llama-{name}"
    marker = folder / "shape.json"  # written last
    content = json.dumps(asdict(shape) | {"with_weights": with_weights})
    if marker.is_file() and marker.read_text() == content:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=2))
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    _write_tokenizer(folder, shape)
    if with_weights:
        _write_weights(folder, shape)
    marker.write_text(content)
    return folder


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.mlp_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_context,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _write_weights(folder: Path, shape: Shape) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(0.0, INIT_STD, generator=generator)

    ones = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": draw(shape.vocab_size, shape.hidden_size), "model.norm.weight": ones}
    if not shape.tied:
        tensors["lm_head.weight"] = draw(shape.vocab_size, shape.hidden_size)
    for layer_idx in range(shape.num_layers):
        prefix = f"model.layers.{layer_idx}"
        for name, size in shape.linears.items():
            tensors[f"{prefix}.{name}.weight"] = draw(*size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = ones.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: token_id for token_id, letter in enumerate(letters)}
    # "Ġ" is how byte-level tokenizers write a space.
    vocabulary |= {f"Ġw{token_id}": token_id for token_id in range(FIRST_WORD_ID, shape.vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
