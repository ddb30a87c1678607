"""Rotary-embedding scaling as config.json spells it, old and new. No torch here.

Follows what transformers 5.23 makes of ``rope_scaling`` (old), ``rope_parameters`` (new) and the fields around them.
Left out: a different RoPE per layer type, multimodal RoPE.
"""

from pathlib import Path
from typing import Any

from longctx.errors import CheckpointError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_WITH_ORIGINAL_LENGTH = ("yarn", "llama3", "longrope")
_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def read_rope(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """RoPE parameters in the new spelling: ``rope_type``, ``rope_theta`` and what the type needs.

    Args:
        folder: for error messages.
        config: config.json with ``head_dim``, ``max_position_embeddings`` and ``model_type`` filled in.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise CheckpointError(f"{folder}: rope_parameters differ between layers or are no object; not supported")
    params: dict[str, Any] = dict(given)
    rope_type = params.get("rope_type", params.pop("type", "default"))
    if config["model_type"] == "phi3" and rope_type == "yarn":  # so do transformers: early files said yarn
        rope_type = "longrope"
    params["rope_type"] = rope_type
    if rope_type not in ROPE_TYPES or "mrope_section" in params:
        allowed = ", ".join(ROPE_TYPES)
        raise CheckpointError(f"{folder}: rope type {rope_type!r} is not supported; supported are {allowed}")
    params.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if config.get("partial_rotary_factor") is not None:
        params.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if rope_type in _WITH_ORIGINAL_LENGTH:
        inner = params.get("original_max_position_embeddings", config["max_position_embeddings"])
        params["original_max_position_embeddings"] = config.get("original_max_position_embeddings", inner)
    _check_rope(folder, params, config)
    return params


def count_context(rope_parameters: dict[str, Any], max_position_embeddings: int) -> int:
    """Tokens the model is meant for: linear, dynamic and yarn stretch the trained length by their factor."""
    rope_type = rope_parameters["rope_type"]
    if rope_type in ("linear", "dynamic"):
        return _count(max_position_embeddings, rope_parameters["factor"])
    if rope_type == "yarn":
        return _count(rope_parameters["original_max_position_embeddings"], rope_parameters["factor"])
    return max_position_embeddings


def _count(num_trained: int, factor: float) -> int:
    """Whole tokens; 3 x 7.666... is 23, which floating point may miss by a little."""
    return int(num_trained * factor * (1 + 1e-9))


def _check_rope(folder: Path, params: dict[str, Any], config: dict[str, Any]) -> None:
    rope_type = params["rope_type"]
    for name in ("rope_theta", *_REQUIRED.get(rope_type, ())):
        if params.get(name) is None:
            raise CheckpointError(f"{folder}: rope type {rope_type} needs {name}, which config.json does not give")
    numbers = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for name in (*numbers, "partial_rotary_factor"):
        value = params.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise CheckpointError(f"{folder}: rope {name}={value!r} is not allowed; must be a number above 0")
    partial = params.get("partial_rotary_factor", 1.0)
    if partial != 1.0 and config["model_type"] != "phi3":
        raise CheckpointError(f"{folder}: partial_rotary_factor={partial!r} is supported for phi3 only")
    dim = int(config["head_dim"] * partial)
    if dim % 2 or not 0 < dim <= config["head_dim"]:
        raise CheckpointError(f"{folder}: partial_rotary_factor={partial!r} rotates {dim} of {config['head_dim']} dims")
    for name in ("short_factor", "long_factor"):
        values = params.get(name)
        if rope_type == "longrope" and (not isinstance(values, list) or len(values) != dim // 2):
            raise CheckpointError(f"{folder}: rope {name} must be a list of {dim // 2} numbers")
