"""What an adapter folder holds, and whether it goes with a base model. No torch here.

PEFT's format: adapter_config.json and adapter_model.safetensors, tensors named as in ``PeftModel``. Norms and
embeddings that were trained with the adapter are whole tensors under the base's names. Only headers are read. Two files
are ours, of what PEFT has no place for: rope.json, the RoPE it was trained with, which context extension changes, and
attention.json, the attention, if that is not dense.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longctx.adapters.method import ANY, AdapterMethod, Settings, Shapes, linear_layers
from longctx.adapters.registry import ADAPTERS
from longctx.errors import CheckpointError
from longctx.models.attention_spec import AttentionSpec, CCASpec, read_attention
from longctx.models.checkpoint import ModelSpec, weight_shapes
from longctx.models.families import FAMILIES
from longctx.models.rope_config import count_context, read_rope
from longctx.models.tensor_files import TensorEntry, read_header, read_json

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
ROPE_FILE = "rope.json"
ATTENTION_FILE = "attention.json"
ROPE_FIELDS = ("rope_parameters", "max_position_embeddings")  # of the base's config.json
PREFIX = "base_model.model."
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter that goes with its base."""

    path: Path
    method: str  # a name of the registry
    settings: Settings
    tensors: tuple[str, ...]  # the adapter's own, as in the file
    whole_tensors: tuple[str, ...]  # names of the base's tensors that it replaces
    rope: dict[str, Any]  # ROPE_FIELDS as it was trained; empty: the base's own
    attention: dict[str, Any]  # of config.json, as it was trained; empty: the base's own


def inspect_adapter(path: str | Path, shapes: Shapes, *, base: str, architecture: str) -> AdapterFolder:
    """Read and check an adapter folder.

    Args:
        path: a PEFT folder.
        shapes: of the base's tensors by name.
        base: what errors call the base.
        architecture: the base's class in transformers.

    Raises:
        CheckpointError: naming the folder, the file, field or tensor, and why the adapter cannot be used.
    """
    folder = Path(path).expanduser()
    _check_folder(folder)
    settings = read_json(folder / CONFIG_FILE)
    method = find_method(folder, settings)
    reason = method.refuse(settings) or _refuse_architecture(settings, base, architecture)
    if reason:
        raise CheckpointError(f"{folder}: {CONFIG_FILE}: {reason}")
    entries = read_header(folder / TENSOR_FILE)
    own = tuple(name for name in entries if not _is_whole(name, shapes))
    for name in own:
        _check_tensor(
            folder, name, entries[name], method.expected_shape(name.removeprefix(PREFIX), shapes), shapes, base
        )
    whole = tuple(name.removeprefix(PREFIX) for name in entries if _is_whole(name, shapes))
    for name in whole:
        wanted = shapes.get(name, shapes[EMBEDDING])  # a tied head has no shape of its own
        _check_tensor(folder, name, entries[PREFIX + name], wanted, shapes, base)
    if not own:
        raise CheckpointError(f"{folder}: {TENSOR_FILE} holds no tensor of a {method.name} adapter")
    _check_partners(folder, own, method)
    _check_layers(folder, own, settings, shapes, base)
    _check_tied(folder, settings, whole, shapes)
    rope, attention = (
        read_json(folder / name) if (folder / name).is_file() else {} for name in (ROPE_FILE, ATTENTION_FILE)
    )
    whole = tuple(name for name in whole if name in shapes)
    return AdapterFolder(folder.resolve(), method.name, settings, own, whole, rope, attention)


def choose_adapter(path: str | None, spec: ModelSpec) -> tuple[ModelSpec, AdapterFolder | None]:
    """``model.adapter``, and its checkpoint with the RoPE and the attention that the adapter was trained with. Raises
    as ``inspect_adapter``, and for an attention that the checkpoint cannot have; without a path nothing changes."""
    if path is None:
        return spec, None
    architecture = FAMILIES[spec.family].architecture
    base = f"{spec.name} ({spec.family})"
    adapter = inspect_adapter(path, weight_shapes(spec), base=base, architecture=architecture)
    spec = replace(spec, attention=_choose_attention(adapter, spec))
    if not adapter.rope:
        return spec, adapter
    num_positions = adapter.rope.get("max_position_embeddings")
    if not isinstance(num_positions, int) or num_positions < 1:
        raise CheckpointError(f"{path}: {ROPE_FILE}: max_position_embeddings={num_positions!r} is not allowed")
    rope = read_rope(adapter.path, {"model_type": spec.family, "head_dim": spec.head_dim} | adapter.rope)
    max_context = count_context(rope, num_positions)
    return replace(spec, rope_type=rope["rope_type"], rope_parameters=rope, max_context=max_context), adapter


def _choose_attention(adapter: AdapterFolder, spec: ModelSpec) -> AttentionSpec | None:
    """CCA may have come with the adapter, whatever its sizes; anything else is the checkpoint's own."""
    trained = read_attention(adapter.path, {"vocab_size": spec.vocab_size} | adapter.attention)
    if trained is None or trained == spec.attention:
        return spec.attention
    if isinstance(trained, CCASpec) and (spec.attention is None or isinstance(spec.attention, CCASpec)):
        return trained
    has = "dense attention" if spec.attention is None else spec.attention
    raise CheckpointError(f"{adapter.path}: {ATTENTION_FILE}: it was trained with {trained}; {spec.name} has {has}")


def find_method(folder: Path, settings: Settings) -> AdapterMethod:
    """The method whose adapter_config.json this is; ``CheckpointError`` if longctx has none."""
    methods: list[AdapterMethod] = [ADAPTERS.get(name)() for name in ADAPTERS]
    for method in methods:
        if method.owns(settings):
            return method
    allowed = ", ".join(sorted({method.peft_type for method in methods}))
    found: Any = settings.get("peft_type")
    raise CheckpointError(f"{folder}: {CONFIG_FILE}: peft_type {found!r} is not supported; allowed: {allowed}")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise CheckpointError(f"{folder}: {what}; an adapter is a PEFT folder with {CONFIG_FILE} and {TENSOR_FILE}")
    if not (folder / CONFIG_FILE).is_file():
        what = "it is a model (config.json), no adapter" if (folder / "config.json").is_file() else "no PEFT adapter"
        raise CheckpointError(f"{folder}: {CONFIG_FILE} is missing: {what}")
    if not (folder / TENSOR_FILE).is_file():
        pickled = " (adapter_model.bin is a pickle file, which can run code when loaded: save it as safetensors)"
        reason = pickled if (folder / "adapter_model.bin").is_file() else ""
        raise CheckpointError(f"{folder}: {TENSOR_FILE} is missing{reason}")


def _refuse_architecture(settings: Settings, base: str, architecture: str) -> str | None:
    trained_on = (settings.get("auto_mapping") or {}).get("base_model_class", architecture)
    if trained_on == architecture:
        return None
    return f"the adapter was trained on a {trained_on}, which {base} is not: it is a {architecture}"


def _is_whole(name: str, shapes: Shapes) -> bool:
    """Whether it replaces a tensor of the base; a tied head is stored with its embedding by PEFT."""
    bare = name.removeprefix(PREFIX)
    return name.startswith(PREFIX) and (bare in shapes or bare == HEAD)


def _check_tensor(
    folder: Path, name: str, entry: TensorEntry, wanted: tuple[int, ...] | None, shapes: Shapes, base: str
) -> None:
    if wanted is None:
        allowed = ", ".join(linear_layers(shapes))
        raise CheckpointError(
            f"{folder}: {TENSOR_FILE}: {name} belongs to no layer of {base}: the adapter is of another architecture, "
            f"or of another kind than {CONFIG_FILE} says; {base} has linear layers {allowed}"
        )
    fits = len(wanted) == len(entry.shape) and all(a in (b, ANY) for a, b in zip(wanted, entry.shape, strict=True))
    if not fits:
        shown = ", ".join("any" if size == ANY else str(size) for size in wanted)
        raise CheckpointError(
            f"{folder}: {TENSOR_FILE}: {name} has shape {entry.shape}; beside {base} it is ({shown}): the adapter was "
            "trained on a model of another size"
        )
    if entry.dtype not in _DTYPES:
        raise CheckpointError(
            f"{folder}: {TENSOR_FILE}: {name} is stored as {entry.dtype}; allowed: {', '.join(_DTYPES)}"
        )


def _check_partners(folder: Path, names: tuple[str, ...], method: AdapterMethod) -> None:
    """Every adapted layer has all its tensors."""
    kinds: dict[str, set[str]] = {}
    for name in names:
        module, _, kind = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        kinds.setdefault(module, set()).add(kind)
    for module, found in kinds.items():
        missing = [kind for kind in method.kinds if kind not in found]
        if missing:
            raise CheckpointError(
                f"{folder}: {TENSOR_FILE}: {module} lacks {', '.join(missing)} of its {method.name} adapter"
            )


def _check_layers(folder: Path, names: tuple[str, ...], settings: Settings, shapes: Shapes, base: str) -> None:
    """Every decoder layer has an adapter, unless the configuration chooses some."""
    if settings.get("layers_to_transform") is not None or not isinstance(settings.get("target_modules"), list):
        return
    wanted, found = (
        {int(name.partition(".layers.")[2].partition(".")[0]) for name in each if ".layers." in name}
        for each in (shapes, names)
    )
    if found and found < wanted:
        raise CheckpointError(
            f"{folder}: {TENSOR_FILE}: layers {', '.join(map(str, sorted(wanted - found)))} of {base} have no adapter: "
            f"it was trained on a model of {len(found)} layers"
        )


def _check_tied(folder: Path, settings: Settings, whole: tuple[str, ...], shapes: Shapes) -> None:
    if HEAD in shapes or not {HEAD, EMBEDDING} & set(whole):
        return
    if not settings.get("ensure_weight_tying"):
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE}: the embedding was trained apart from the head that it is tied to "
            "(ensure_weight_tying is not set), which is not supported"
        )
