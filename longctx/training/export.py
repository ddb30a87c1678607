"""A checkpoint as a folder that others read: a Hugging Face model, or an adapter in PEFT's format.

The checkpoint's fragments are put together weight by weight, so that nothing has to be gathered from ranks and no more
than one file's weights are in memory, whatever sharded them.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from longctx.adapters.adapter import file_names, save_adapter
from longctx.models.checkpoint import ModelSpec
from longctx.training.checkpoints import CheckpointReader
from longctx.training.config import TrainConfig
from longctx.training.starting_model import DTYPES, read_settings

MAX_FILE_BYTES = 4 << 30
_COPIED = (  # of the folder that the run started from
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.jinja",
    "generation_config.json",
    "LICENSE*",
)


def export_model(reader: CheckpointReader, config: TrainConfig, spec: ModelSpec, folder: Path) -> Path:
    """Write the checkpoint's model into ``folder``, which is replaced once all is there.

    Args:
        reader: of a checkpoint that has every weight.
        config: of the run.
        spec: of the checkpoint that the run started from, with the attention and vocabulary that it trained.
        folder: for the model.
    """
    hidden = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    settings = read_settings(spec, config.model, config.train.context_length)
    dtype = _choose_dtype(config)
    settings.dtype = dtype
    settings.save_pretrained(hidden)
    for pattern in _COPIED:
        for path in spec.path.glob(pattern):
            shutil.copy2(path, hidden / path.name)
    if config.data.chat_template is not None:
        shutil.copy2(config.data.chat_template, hidden / "chat_template.jinja")
    _write_weights(reader, DTYPES[dtype], hidden)
    replace_folder(hidden, folder)
    return folder


def export_adapter(reader: CheckpointReader, config: TrainConfig, model: PreTrainedModel, folder: Path) -> Path:
    """Write the checkpoint's adapter into ``folder``, likewise; ``model`` says what adapter it is, its weights are not
    read."""
    hidden = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    names = file_names(model)
    dtype = DTYPES[_choose_dtype(config)]
    state = {names[name]: weight.to(dtype) for name, weight in read_weights(reader, list(names)).items()}
    save_adapter(state, model, hidden)
    replace_folder(hidden, folder)
    return folder


def _choose_dtype(config: TrainConfig) -> str:
    chosen = config.checkpoint.export_dtype
    return config.model.dtype if chosen == "auto" else chosen


def replace_folder(new: Path, folder: Path) -> None:
    """Put ``new`` where ``folder`` is; at no time is there a half of either."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_weights(reader: CheckpointReader, names: list[str]) -> dict[str, torch.Tensor]:
    """Whole weights of a checkpoint, float32."""
    shapes = reader.state["shapes"]
    return {name: reader.read(name, "master", 0, torch.Size(shapes[name]).numel()).view(shapes[name]) for name in names}


def _write_weights(reader: CheckpointReader, dtype: torch.dtype, folder: Path) -> None:
    groups = list(_split(reader.state["shapes"], dtype.itemsize))
    places: dict[str, str] = {}
    total = 0
    for index, names in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: weight.to(dtype) for name, weight in read_weights(reader, names).items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # whoever may read one may read both
        places |= dict.fromkeys(names, file)
        total += sum(weight.numel() * weight.element_size() for weight in tensors.values())
    if len(groups) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1) + "\n", encoding="utf-8")


def _split(shapes: dict[str, list[int]], element_size: int) -> Iterator[list[str]]:
    """Names, so many together that a file is no larger than ``MAX_FILE_BYTES``, or one."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = torch.Size(shape).numel() * element_size
        if names and size + num_bytes > MAX_FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    if names:
        yield names
