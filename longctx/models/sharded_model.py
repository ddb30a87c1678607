"""A transformers model whose weights come module by module, so that ranks that cut them up never hold it whole.

The model is made without memory (torch's ``meta`` device) and filled from its first module to its last: a module's own
weights are allocated, read from the checkpoint or drawn, and given to the ``Sharder`` before those of the next one.
Drawn weights are the same with and without a sharder.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from longctx.errors import CheckpointError
from longctx.models.checkpoint import ModelSpec
from longctx.models.tensor_files import TensorEntry, read_tensor_entries

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")  # a row for each token


class Sharder(Protocol):
    """Cuts weights up over ranks; all ranks give it the same modules in the same order."""

    is_source: bool  # whether this rank's values are those that count; other ranks' may be anything

    def shard(self, module: torch.nn.Module) -> None:
        """Keep this rank's part of the module's own parameters, which stay the same objects."""
        ...


def draw_weights(
    config: Any, *, dtype: torch.dtype, device: torch.device, seed: int, sharder: Sharder | None = None
) -> PreTrainedModel:
    """Random weights on ``device`` as transformers initialises them, without disturbing other random numbers."""

    def fill(model: Any, _: str, module: torch.nn.Module) -> None:
        if sharder is None or sharder.is_source or _has_buffers(module):
            model._init_weights(module)

    return _build(config, dtype, device, seed, fill, sharder)


def read_weights(
    spec: ModelSpec, config: Any, *, dtype: torch.dtype, device: torch.device, sharder: Sharder | None = None
) -> PreTrainedModel:
    """The weights of ``spec`` on ``device``, in ``dtype``; the ranks whose values count read them.

    Where ``config.vocab_size`` is higher than the checkpoint's, further rows of the vocabulary are the mean of those
    that there are.

    Raises:
        CheckpointError: if weights are missing, left over or of the wrong shape, cannot be read, or are tied by
            config.json and stored with different values.
    """
    entries = read_tensor_entries(spec.path)

    def read(name: str) -> torch.Tensor:
        path = spec.path / entries[name].file  # opened for each tensor: what was read stays mapped until it is closed
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{spec.path}: weights cannot be loaded: {error}") from error

    def fill(model: Any, name: str, module: torch.nn.Module) -> None:
        is_source = sharder is None or sharder.is_source
        if not name:
            _check_names(spec, model, entries)
            if is_source:
                _check_tied(spec, model, entries, read)
        if _has_buffers(module):
            model._init_weights(module)  # buffers are not stored
        for key, weight in module.named_parameters(prefix=name, recurse=False) if is_source else ():
            stored = read(key)
            weight[: len(stored)].copy_(stored)
            if len(stored) < len(weight):
                weight[len(stored) :] = stored.float().mean(0).to(weight.dtype)

    return _build(config, dtype, device, 0, fill, sharder)


def refuse_problems(spec: ModelSpec, problems: Mapping[str, Iterable[Any]]) -> None:
    """Raise ``CheckpointError`` if there are names under one of ``missing_keys``, ``unexpected_keys``, ..."""
    for kind, names in problems.items():
        found = sorted(str(name) for name in names)
        if found:
            named = ", ".join(found[:3]) + ("" if len(found) <= 3 else ", ...")
            raise CheckpointError(f"{spec.path}: {len(found)} {kind.replace('_', ' ')}: {named}")


def _build(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    fill: Callable[[Any, str, torch.nn.Module], None],
    sharder: Sharder | None,
) -> PreTrainedModel:
    """Call ``fill`` with the model, a module's name and the module, whose own tensors are allocated; for each."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        tied = {key.rpartition(".")[0] for key in model.all_tied_weights_keys}
        for name, module in model.named_modules():
            if name not in tied:
                module.to_empty(device=device, recurse=False)
                fill(model, name, module)
                if sharder is not None:
                    sharder.shard(module)
        model.tie_weights()
    return model


def _has_buffers(module: torch.nn.Module) -> bool:
    return next(module.buffers(recurse=False), None) is not None


def _check_names(spec: ModelSpec, model: Any, entries: dict[str, TensorEntry]) -> None:
    """By transformers' rules for what a checkpoint may leave out and have besides."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shared = shapes.keys() & entries.keys()
    stored = {name: _grow(name, entries[name].shape, shapes[name]) for name in shared}
    refuse_problems(
        spec,
        {
            "missing_keys": shapes.keys() - entries.keys() - model.all_tied_weights_keys.keys(),
            "unexpected_keys": [
                name for name in entries.keys() - shapes.keys() if not name.endswith("rotary_emb.inv_freq")
            ],
            "mismatched_keys": [name for name in shared if shapes[name] != stored[name]],
        },
    )


def _grow(name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """The stored shape, with the rows that the vocabulary has gained."""
    if name not in VOCABULARY or len(wanted) != len(stored) or wanted[0] < stored[0]:
        return stored
    return (wanted[0], *stored[1:])


def _check_tied(
    spec: ModelSpec, model: Any, entries: dict[str, TensorEntry], read: Callable[[str], torch.Tensor]
) -> None:
    for target, source in model.all_tied_weights_keys.items():
        if target in entries and not torch.equal(read(target), read(source)):
            raise CheckpointError(
                f"{spec.path}: {target} and {source} are stored with different values, but config.json ties them; "
                "tie_word_embeddings must be false"
            )
