"""The model families longctx serves: what differs between them in names, defaults and stored tensors. No torch here.

The mathematics is not written down here: it is taken from transformers' modules (``packed.py``).
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between families in names and defaults; the mathematics is taken from transformers' modules."""

    architecture: str
    defaults: dict[str, Any]  # of config.json fields, as in transformers
    fused: bool = False  # qkv_proj and gate_up_proj instead of five matrices
    head_norm: bool = False  # q_norm and k_norm
    attention_bias: str = "none"  # "qkv": always on these three; "config": on all four if attention_bias says so
    mlp_bias: bool = False  # on all three matrices if mlp_bias says so


FAMILIES = {
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048}, attention_bias="config", mlp_bias=True),
    "mistral": Family(
        "MistralForCausalLM", {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
        attention_bias="qkv",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096},
        head_norm=True,
        attention_bias="config",
    ),
    "phi3": Family(
        "Phi3ForCausalLM", {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}, fused=True
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        {
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
        attention_bias="config",
    ),
}


def expected_shapes(config: dict[str, Any], family: Family) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the checkpoint must hold."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    matrices = {
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    biased = [name for name in matrices if _has_bias(name, config, family)]
    if family.fused:
        del matrices["self_attn.q_proj"], matrices["self_attn.k_proj"], matrices["self_attn.v_proj"]
        del matrices["mlp.gate_proj"], matrices["mlp.up_proj"]
        matrices |= {"self_attn.qkv_proj": (q_size + 2 * kv_size, hidden), "mlp.gate_up_proj": (2 * inner, hidden)}
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in matrices.items()}
    layer |= {f"{name}.bias": (matrices[name][0],) for name in biased}
    layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if family.head_norm:
        layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer_idx in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer_idx}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _has_bias(matrix: str, config: dict[str, Any], family: Family) -> bool:
    if matrix.startswith("mlp."):
        return family.mlp_bias and bool(config.get("mlp_bias", False))
    if family.attention_bias == "config":
        return bool(config.get("attention_bias", False))
    return family.attention_bias == "qkv" and matrix != "self_attn.o_proj"
