"""The safetensors files of a checkpoint folder: which tensors they hold, and whether they are whole. No torch here.

Only headers are read (safetensors format, ``safetensors.README``: 8 bytes of little-endian header size, a JSON header
with dtype, shape and byte offsets of each tensor, then the data), so a 100 GB checkpoint is checked in milliseconds.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as a safetensors header describes it."""

    dtype: str  # "F32", "BF16", "F16", ...
    shape: tuple[int, ...]
    file: str  # its name in the folder


def check_tensors(
    folder: Path, entries: dict[str, TensorEntry], shapes: dict[str, tuple[int, ...]], *, dtypes: tuple[str, ...]
) -> None:
    """Raise ``CheckpointError`` unless each of ``shapes`` is there with that shape and a dtype out of ``dtypes``."""
    missing = [name for name in shapes if name not in entries]
    if missing:
        named = ", ".join(missing[:3]) + ("" if len(missing) <= 3 else ", ...")
        raise CheckpointError(f"{folder}: {len(missing)} of {len(shapes)} tensors are missing: {named}")
    for name, shape in shapes.items():
        entry = entries[name]
        if entry.shape != shape:
            raise CheckpointError(f"{folder}: {name} has shape {entry.shape}; config.json says {shape}")
        if entry.dtype not in dtypes:
            allowed = ", ".join(dtypes)
            raise CheckpointError(f"{folder}: {name} is stored as {entry.dtype}; allowed: {allowed}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; raises ``CheckpointError`` naming the file if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path.parent}: {path.name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path.parent}: {path.name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.parent}: {path.name} holds a JSON {type(value).__name__}, not an object")
    return value


def read_tensor_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the folder by name, after checking that all files are there and whole.

    Raises ``CheckpointError`` naming what is missing or cut short.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(f"{folder}: {_explain_missing(folder)}")
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{folder}: {INDEX_FILE} has no weight_map of tensor names to file names")
    shards = sorted(set(weight_map.values()))
    _check_shards(folder, shards)
    headers = {shard: read_header(folder / shard) for shard in shards}
    for tensor, shard in weight_map.items():
        if tensor not in headers[shard]:
            raise CheckpointError(f"{folder}: {INDEX_FILE} says that {tensor} is in {shard}, but it is not")
    return {tensor: headers[shard][tensor] for tensor, shard in weight_map.items()}


def _check_shards(folder: Path, shards: list[str]) -> None:
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        named = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise CheckpointError(f"{folder}: {len(missing)} of {len(shards)} weight files are missing: {named}")


def _explain_missing(folder: Path) -> str:
    others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
    if others:
        return (
            f"weights are in PyTorch pickle files ({others[0]}), which can run code when loaded; only safetensors is "
            "allowed. Convert once: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf:
        return f"weights are in GGUF format ({gguf[0]}); only safetensors is allowed"
    return f"no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there"


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensors of one safetensors file by name; ``CheckpointError`` if it is not as long as its header says."""
    where = f"{path.parent}: {path.name}"
    file_size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_size = int.from_bytes(prefix, "little")
        if (prefix + file.read(16)).startswith(_LFS_POINTER):
            raise CheckpointError(f"{where} is a Git LFS pointer, not the file itself; run git lfs pull")
        if len(prefix) < 8 or header_size > min(_MAX_HEADER_BYTES, file_size - 8):
            raise CheckpointError(f"{where} is cut short or no safetensors file ({file_size} bytes)")
        file.seek(8)
        text = file.read(header_size)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        entries = {
            name: TensorEntry(entry["dtype"], tuple(entry["shape"]), path.name) for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise CheckpointError(f"{where} has no valid safetensors header") from None
    expected_size = 8 + header_size + end
    if file_size != expected_size:
        raise CheckpointError(f"{where} is damaged: {file_size} bytes, its header says {expected_size}")
    return entries
