"""Adapters on transformers models: attached, trained, saved and loaded; the methods of the registry say what each is.

A model with an adapter is still the transformers model that it was. Trained parameters have the base's dtype: DeepSpeed
keeps float32 masters of them, and in float32 training they are float32. Norms and embeddings are trained where they
are, not as copies. Names in states and folders are PEFT's; LoRA and DoRA folders load with ``peft``.
"""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from longctx.adapters.config import PeftConfig
from longctx.adapters.folder import (
    ATTENTION_FILE,
    CONFIG_FILE,
    EMBEDDING,
    HEAD,
    PREFIX,
    ROPE_FIELDS,
    ROPE_FILE,
    TENSOR_FILE,
    AdapterFolder,
    inspect_adapter,
)
from longctx.adapters.merge import merge_adapter
from longctx.adapters.method import AdapterMethod, Shapes, norm_layers
from longctx.adapters.registry import ADAPTERS
from longctx.models.attention_spec import KEY as ATTENTION_KEY

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]

logger = logging.getLogger(__name__)

_SETTINGS = "longctx_adapter"  # attribute of an adapted model: its adapter_config.json, and the method's name


def add_adapter(
    model: PreTrainedModel, config: PeftConfig, *, seed: int = 0, gather: Gather = nullcontext
) -> PreTrainedModel:
    """Freeze ``model`` and give it an adapter, in place; with ``config.path`` that one, to be trained on.

    Args:
        model: a decoder of a family that longctx serves, with its weights.
        config: the adapter; ``method`` is not ``none``.
        seed: of its random weights, which are the same on every rank; other random numbers are not disturbed.
        gather: see ``load_adapter``.

    Returns:
        The same model. A new adapter does not change what it computes.

    Raises:
        ConfigError: if ``target_modules`` are no linear layers of the model; it names those there are.
        CheckpointError: as ``load_adapter``.
    """
    if config.path is not None:
        return load_adapter(model, config.path, gather)
    shapes, method = whole_shapes(model), _make_method(config.method)
    trained = (norm_layers(shapes) if config.train_norms else []) + ["embed_tokens"] * config.train_embeddings
    settings = {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "inference_mode": True,
        **method.describe(config, shapes),
        "modules_to_save": trained or None,
        "ensure_weight_tying": config.train_embeddings and HEAD not in shapes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _attach(model, method, settings)
    for name, parameter in model.named_parameters():
        if name in shapes and name.endswith(".weight") and name.split(".")[-2] in trained:
            parameter.requires_grad_(True)
    return model


def load_adapter(model: PreTrainedModel, folder: str | Path, gather: Gather = nullcontext) -> PreTrainedModel:
    """Freeze ``model`` and give it the adapter of a PEFT folder, to be trained on, in place. Returns ``model``.

    Where ZeRO 3 has cut ``model`` up, all ranks do so together, and parameters within ``gather`` are whole and can be
    changed.

    Raises:
        CheckpointError: if the folder is no adapter of a kind that longctx knows, or does not go with the model.
    """
    base = f"{model.name_or_path or 'the model'} ({model.config.model_type})"
    adapter = inspect_adapter(folder, whole_shapes(model), base=base, architecture=type(model).__name__)
    rope = _read_rope(model)["rope_parameters"]
    if adapter.rope and adapter.rope["rope_parameters"] != rope:
        logger.warning("%s was trained with RoPE %s; here it is %s", folder, adapter.rope["rope_parameters"], rope)
    _attach(model, _make_method(adapter.method), adapter.settings)
    tensors = load_file(adapter.path / TENSOR_FILE)
    parameters = dict(model.named_parameters())
    for name in adapter.whole_tensors:
        parameters[name].requires_grad_(True)
    with torch.no_grad():
        for name, parameter in _trained_parameters(model).items():
            with gather([parameter]):
                parameter.copy_(tensors[name])
    return model


def apply_adapter(model: PreTrainedModel, adapter: AdapterFolder) -> None:
    """Give ``model`` an adapter to be served with, in place: merged, or as modules where it cannot be."""
    method = _make_method(adapter.method)
    if method.is_merged:
        merge_adapter(model, adapter)
    else:
        load_adapter(model, adapter.path)
        model.requires_grad_(False)


def adapter_state(model: PreTrainedModel, gather: Gather = nullcontext) -> dict[str, torch.Tensor]:
    """What is trained, by its name in a PEFT folder: copies on the CPU. Collective where ``gather`` is.

    Args:
        model: from ``add_adapter`` or ``load_adapter``.
        gather: called with a list of parameters; within it they are whole (ZeRO 3). One parameter at a time, in the
            same order on every rank.
    """
    state: dict[str, torch.Tensor] = {}
    for name, parameter in _trained_parameters(model).items():
        with gather([parameter]):
            state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return state


def save_adapter(state: dict[str, torch.Tensor], model: PreTrainedModel, folder: str | Path) -> None:
    """Write a PEFT folder; on one rank. ``model`` says what adapter it is, its tensors are not read.

    Args:
        state: from ``adapter_state``.
        model: whose state it is.
        folder: made if missing.
    """
    folder, settings = Path(folder), getattr(model, _SETTINGS)[1]
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(state)
    if settings.get("ensure_weight_tying") and PREFIX + EMBEDDING in tensors:
        tensors[PREFIX + HEAD] = tensors[PREFIX + EMBEDDING].clone()  # peft wants the tied one, too
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
    contents = {CONFIG_FILE: settings, ROPE_FILE: _read_rope(model)}
    if (attention := getattr(model.config, ATTENTION_KEY, None)) is not None:
        contents[ATTENTION_FILE] = {ATTENTION_KEY: attention}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def file_names(model: PreTrainedModel) -> dict[str, str]:
    """What each trained parameter of an adapted model is called in a PEFT folder, by its name in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: name for name, parameter in _trained_parameters(model).items()}


def whole_shapes(model: PreTrainedModel) -> Shapes:
    """Of a model's parameters by name; also where ZeRO 3 has cut them up."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def _read_rope(model: PreTrainedModel) -> dict[str, Any]:
    return {name: getattr(model.config, name) for name in ROPE_FIELDS}


def _make_method(name: str) -> AdapterMethod:
    return ADAPTERS.get(name)()


def _attach(model: PreTrainedModel, method: AdapterMethod, settings: dict[str, Any]) -> None:
    assert not hasattr(model, _SETTINGS), "the model has an adapter already"
    model.requires_grad_(False)
    method.attach(model, settings)
    setattr(model, _SETTINGS, (method.name, settings))


def _trained_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """By their names in a PEFT folder."""
    method = _make_method(getattr(model, _SETTINGS)[0])
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {PREFIX + method.file_name(name): parameter for name, parameter in trained}
