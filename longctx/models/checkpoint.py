"""What a Hugging Face checkpoint folder holds, and whether longctx can serve it. No torch here.

``inspect_checkpoint`` reads config.json, generation_config.json and the safetensors headers, and refuses, with the
reason, whatever would fail or be silently wrong later. Missing fields take the defaults of transformers 5.23.
Left out: quantised weights, mixture-of-experts, vision, encoder-decoder models, custom code.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longctx.errors import CheckpointError, ConfigError
from longctx.models.attention_spec import AttentionSpec, LandmarkSpec, read_attention
from longctx.models.families import FAMILIES, expected_shapes
from longctx.models.rope_config import count_context, read_rope
from longctx.models.tensor_files import TensorEntry, check_tensors, read_json, read_tensor_entries

SHIPPED = ("demo", "demo_landmark", "demo_cca")  # models that ship with longctx, by name
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
LANDMARK_CONTEXT = 1 << 20  # tokens, unless model.max_context says otherwise or memory is too small
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling that the checkpoint's generation_config.json recommends; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A checkpoint that can be served. Plain data: it travels to workers."""

    path: Path
    name: str  # the folder's
    family: str  # a key of FAMILIES
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # rows of the embedding; the tokenizer may know fewer
    max_context: int  # tokens of prompt and output together, RoPE scaling included
    sliding_windows: tuple[int | None, ...]  # per layer; None: all earlier tokens are seen
    dtype: str  # of the stored weights: float32, bfloat16 or float16
    eos_token_ids: frozenset[int]
    sampling: SamplingDefaults
    rope_type: str  # one of rope_config.ROPE_TYPES
    rope_parameters: Mapping[str, Any] = field(hash=False)
    tie_word_embeddings: bool
    num_parameters: int
    attention: AttentionSpec | None = None  # what it was trained with; None: dense

    @property
    def hidden_token_id(self) -> int | None:
        """The landmark's: the engine alone puts it in, and it is never generated."""
        return self.attention.landmark_token_id if isinstance(self.attention, LandmarkSpec) else None


def absolute_path(path: str) -> str:
    """A checkpoint folder's path for processes that run elsewhere; names of models that ship stay as they are."""
    return path if path in SHIPPED else os.path.abspath(path)


def inspect_checkpoint(path: str | Path, *, require_weights: bool = True) -> ModelSpec:
    """Read and check the checkpoint folder ``path``; the names in ``SHIPPED`` are the models that ship with longctx.

    Args:
        path: a Hugging Face folder.
        require_weights: False accepts a folder without safetensors files (random weights, benchmarks).

    Raises:
        CheckpointError: naming the folder, the file or field, and why it cannot be served.
    """
    folder = Path(__file__).parent / path if str(path) in SHIPPED else Path(path).expanduser()
    _check_folder(folder)
    config = read_json(folder / "config.json")
    family = _check_family(folder, config)
    config = FAMILIES[family].defaults | config
    sizes = _read_sizes(folder, config)
    max_positions = _positive(folder, config, "max_position_embeddings")
    rope_parameters = read_rope(folder, config)
    shapes = expected_shapes(config, FAMILIES[family])
    entries: dict[str, TensorEntry] = {}
    if require_weights or any(folder.glob("*.safetensors*")):
        entries = read_tensor_entries(folder)
        check_tensors(folder, entries, shapes, dtypes=tuple(_DTYPES))
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    return ModelSpec(
        path=folder.resolve(),
        name=folder.resolve().name,
        family=family,
        **sizes,
        max_context=count_context(rope_parameters, max_positions),
        sliding_windows=_read_windows(folder, config),
        dtype=_read_dtype(folder, config, entries),
        eos_token_ids=_read_eos(folder, config) | _read_eos(folder, generation),
        sampling=SamplingDefaults(**{name: generation.get(name) for name in SamplingDefaults.__slots__}),
        rope_type=rope_parameters["rope_type"],
        rope_parameters=rope_parameters,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        attention=read_attention(folder, config),
    )


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of the checkpoint's matrices and norms; biases are left out."""
    sizes = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tie_word_embeddings,
    }
    shapes = expected_shapes(sizes, FAMILIES[spec.family])
    return {name: shape for name, shape in shapes.items() if name.endswith(".weight")}


def choose_context(spec: ModelSpec, max_context: int | None) -> int:
    """``model.max_context``, or the checkpoint's limit; raises ``ConfigError`` if it is above that.

    Landmark attention has none: a token sees k earlier blocks at positions that were trained, wherever they are.
    """
    if isinstance(spec.attention, LandmarkSpec):
        return max_context or LANDMARK_CONTEXT
    if max_context is not None and max_context > spec.max_context:
        raise ConfigError(
            f"model.max_context={max_context} is not allowed: {spec.name} takes at most {spec.max_context} tokens"
        )
    return max_context or spec.max_context


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder; model.path is demo or a Hugging Face checkpoint folder")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; model.path is demo or a Hugging Face checkpoint folder")
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder}: is a PEFT adapter (adapter_config.json), not a model: config.json is missing")
    raise CheckpointError(f"{folder}: config.json is missing, so this is no Hugging Face checkpoint")


def _check_family(folder: Path, config: dict[str, Any]) -> str:
    """The family's name; raises for every kind of model that longctx does not run."""
    supported = f"supported are {', '.join(FAMILIES)}"
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise CheckpointError(f"{folder}: quantization_config ({method}): quantised weights are not supported")
    if config.get("is_encoder_decoder"):
        raise CheckpointError(f"{folder}: is_encoder_decoder: encoder-decoder models are not supported; {supported}")
    for name in ("vision_config", "audio_config", "text_config"):
        if name in config:
            raise CheckpointError(f"{folder}: {name}: multimodal models are not supported; {supported}")
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.get(name):
            raise CheckpointError(f"{folder}: {name}: mixture-of-experts models are not supported; {supported}")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(f"{folder}: model_type {family!r} is not supported; {supported}")
    architectures = config.get("architectures")
    if architectures and FAMILIES[family].architecture not in architectures:
        wanted = FAMILIES[family].architecture
        raise CheckpointError(f"{folder}: architectures {architectures} is no language model; must be {wanted}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if config.get(name):
            raise CheckpointError(f"{folder}: {name}={config[name]!r} is not supported")
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        allowed = ", ".join(ACTIVATIONS)
        raise CheckpointError(f"{folder}: hidden_act {activation!r} is not supported; allowed: {allowed}")
    return family


def _read_sizes(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    for name in _REQUIRED:
        if name not in config:
            raise CheckpointError(f"{folder}: config.json has no {name}")
    num_heads = _positive(folder, config, "num_attention_heads")
    hidden_size = _positive(folder, config, "hidden_size")
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = num_heads
    if config.get("head_dim") is None:
        config["head_dim"] = hidden_size // num_heads
    num_kv_heads = _positive(folder, config, "num_key_value_heads")
    head_dim = _positive(folder, config, "head_dim")
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{folder}: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"{folder}: head_dim={head_dim} is odd; rotary embeddings need an even one")
    return {
        "num_layers": _positive(folder, config, "num_hidden_layers"),
        "hidden_size": hidden_size,
        "intermediate_size": _positive(folder, config, "intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": _positive(folder, config, "vocab_size"),
    }


def _positive(folder: Path, config: dict[str, Any], name: str) -> int:
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{folder}: config.json: {name}={value!r} is not allowed; must be an integer above 0")
    return value


def _read_windows(folder: Path, config: dict[str, Any]) -> tuple[int | None, ...]:
    """Sliding window of each layer, by the rules of transformers' configuration classes."""
    num_layers, family = config["num_hidden_layers"], config["model_type"]
    if family in ("llama", "gemma"):
        return (None,) * num_layers
    window = config.get("sliding_window")
    if family in ("qwen2", "qwen3") and not config.get("use_sliding_window", False):
        window = None
    if window is not None:
        window = _positive(folder, config, "sliding_window")
    if family in ("mistral", "phi3"):
        return (window,) * num_layers
    num_full = config.get("max_window_layers", 28) if window else num_layers
    derived = ["full_attention" if layer_idx < num_full else "sliding_attention" for layer_idx in range(num_layers)]
    layer_types = config.get("layer_types") or derived
    if len(layer_types) != num_layers:
        raise CheckpointError(f"{folder}: layer_types has {len(layer_types)} entries for {num_layers} layers")
    for layer_type in layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            allowed = "full_attention, sliding_attention"
            raise CheckpointError(f"{folder}: layer type {layer_type!r} is not supported; supported are {allowed}")
        if layer_type == "sliding_attention" and window is None:
            raise CheckpointError(f"{folder}: layer_types asks for sliding_attention but no sliding_window is in use")
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)


def _read_dtype(folder: Path, config: dict[str, Any], entries: dict[str, TensorEntry]) -> str:
    """The embedding's stored type; without weights, what config.json says."""
    if entries:
        return _DTYPES[entries["model.embed_tokens.weight"].dtype]
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in _DTYPES.values():
        raise CheckpointError(f"{folder}: dtype {dtype!r} is not supported; allowed: {', '.join(_DTYPES.values())}")
    return dtype


def _read_eos(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
        raise CheckpointError(f"{folder}: eos_token_id={value!r} is not allowed; must be a token id or a list of them")
    return frozenset(ids)
