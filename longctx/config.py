"""From YAML files and ``key=value`` overrides to validated dataclasses.

Hydra composes; this module checks every key against the dataclasses, which own names, types, defaults and bounds, and
makes them. Hydra goes no further than here. No torch, no ray.
"""

import dataclasses
import difflib
import logging
import re
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from longctx.errors import ConfigError
from parallel.option import allowed, check

T = TypeVar("T")

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"
EXPERIMENT = "experiment"  # a group whose files set keys of all the others
_SHOWN_KEYS = 12  # keys listed in an error


def compose(root: type[T], config_name: str, overrides: list[str], *, config_dir: Path | None = None) -> T:
    """The configuration of one command.

    Args:
        root: a dataclass whose fields are group dataclasses or plain values.
        config_name: primary YAML in ``configs/``.
        overrides: Hydra's ``key=value`` and ``group=option``.
        config_dir: a folder of the user's own YAML, searched as well.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: there is no such folder")
    folders = [CONFIG_FOLDER, *([config_dir.resolve()] if config_dir else [])]
    has_experiments = takes_experiments(config_name)
    arguments = [_check_override(text, root, folders, has_experiments) for text in overrides]
    if config_dir is not None:
        arguments.append(f"hydra.searchpath=[file://{config_dir.resolve()}]")
    values = _run_hydra(config_name, arguments)
    if has_experiments and isinstance(values.get(EXPERIMENT), dict):
        raise ConfigError(
            "a file of the group experiment sets keys of other groups: it begins with # @package _global_"
        )
    return build(root, values, "")


def takes_experiments(config_name: str) -> bool:
    """Whether the defaults of a primary YAML name the group ``experiment``."""
    from omegaconf import OmegaConf

    primary = OmegaConf.to_container(OmegaConf.load(CONFIG_FOLDER / f"{config_name}.yaml"))
    assert isinstance(primary, dict)
    return any(EXPERIMENT in entry for entry in primary.get("defaults", []))


def list_keys(root: type) -> dict[str, dataclasses.Field[Any]]:
    """Every key of a command, dotted, in order."""
    keys: dict[str, dataclasses.Field[Any]] = {}
    for field in dataclasses.fields(root):
        group = _group_of(root, field.name)
        if group is None:
            keys[field.name] = field
        else:
            keys |= {f"{field.name}.{name}": inner for name, inner in list_keys(group).items()}
    return keys


def list_options(folder: str, roots: list[Path]) -> list[str]:
    """Names of the YAML files of one group."""
    return sorted({path.stem for root in roots for path in (root / folder).glob("*.yaml")})


def folder_of(root: type, group: str) -> str:
    """Where the YAML files of a group are: two commands whose groups share a name, but not the keys, need two."""
    fields = {field.name: field for field in dataclasses.fields(root)}
    return fields[group].metadata.get("folder", group) if group in fields else group


def describe_type(root: type, name: str) -> str:
    """The type of a field as users write it."""
    return _type_text(get_type_hints(root)[name])


def _run_hydra(config_name: str, arguments: list[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    logging.getLogger("hydra").setLevel(logging.WARNING)
    try:
        with initialize_config_dir(config_dir=str(CONFIG_FOLDER), version_base="1.3"):
            composed = hydra_compose(config_name=config_name, overrides=arguments)
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the configuration cannot be composed: {error}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _check_override(text: str, root: type, folders: list[Path], has_experiments: bool) -> str:
    """The override as Hydra takes it; raises ``ConfigError`` if its key or group option does not exist."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    text = _quote_text(text, root)
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        raise ConfigError(f"{text!r} is no override; write key=value, for example server.port=9000") from None
    key = override.key_or_group
    if override.is_delete() or override.is_sweep_override():
        raise ConfigError(f"{text!r} is not allowed: give one value, as {key}=VALUE (quote a value that holds a comma)")
    groups = [field.name for field in dataclasses.fields(root) if _group_of(root, field.name)]
    if key in groups or (has_experiments and key == EXPERIMENT):
        folder = folder_of(root, key)
        options = list_options(folder, folders)
        if override.value() not in options:
            there = ", ".join(options) or "none; put NAME.yaml into the folder experiment of your --config-dir"
            raise ConfigError(f"{key}={override.value()} is not allowed; allowed for {key}: {there}")
        return f"{key}={override.value()}" if folder == key else f"{folder}@{key}={override.value()}"
    keys = list_keys(root)
    if key not in keys:
        raise ConfigError(_explain_unknown(key, list(keys), groups))
    return "++" + text.lstrip("+")


def _quote_text(text: str, root: type) -> str:
    """The override with its value quoted if the key takes free text and Hydra's grammar would not read it as one.

    A prompt may hold commas, brackets and quotes. ``null``, and a value that is quoted already, stay as they are.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    name, _, value = text.partition("=")
    field = list_keys(root).get(name.lstrip("+"))
    if field is None or value in ("", "null") or field.metadata.get("choices") or str not in _kinds(field.type):
        return text
    with suppress(HydraException):
        override = OverridesParser.create().parse_override(text)
        is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        if not override.is_sweep_override() and (is_quoted or override.value() == value):
            return text
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"{name}='{escaped}{escaped[len(escaped) - trailing :]}'"


def _explain_unknown(key: str, keys: list[str], groups: list[str]) -> str:
    group, _, leaf = key.rpartition(".")
    close = [name for name in keys if name.rpartition(".")[2] == leaf] or difflib.get_close_matches(key, keys, 3, 0.6)
    suggestion = f"; did you mean {' or '.join(close[:3])}?" if close else ""
    inside = [name for name in keys if name.startswith(f"{group}.")] if group in groups else []
    listed = f"; allowed in {group}: {', '.join(name.removeprefix(group + '.') for name in inside)}" if inside else ""
    if not inside and not close:
        listed = f"; allowed: {', '.join([f'{name}.*' for name in groups] + [k for k in keys if '.' not in k])}"
    return f"{key} is unknown{suggestion}{listed}"


def build(kind: type[T], values: dict[str, Any], prefix: str) -> T:
    """An object of the dataclass ``kind``; ``values`` may leave fields out."""
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ConfigError(
                _explain_unknown(prefix + name, [prefix + field for field in fields], [prefix.rstrip(".")])
            )
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        group = _group_of(kind, name)
        if group is not None:
            if value is not None and not isinstance(value, dict):
                raise ConfigError(f"{prefix}{name}={value!r} is not allowed: {name} is a group of keys")
            arguments[name] = build(group, value or {}, f"{prefix}{name}.")
            continue
        arguments[name] = _convert(value, hints[name], prefix + name, fields[name])
    try:
        config = kind(**arguments)
        check(config, prefix)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return config


def _convert(value: Any, hint: Any, key: str, field: dataclasses.Field[Any]) -> Any:
    for kind in _kinds(hint):
        if kind is NoneType:
            if value is None:
                return None
        elif get_origin(kind) is list:
            (item_kind,) = get_args(kind)
            taken = str | int | float if item_kind is str else item_kind
            if isinstance(value, list) and all(
                isinstance(item, taken) and not isinstance(item, bool) for item in value
            ):
                return [item_kind(item) for item in value]
        elif get_origin(kind) is dict:  # of text, by name
            if isinstance(value, dict) and all(isinstance(item, str | int | float) for item in value.values()):
                return {str(name): str(item) for name, item in value.items()}
        elif kind is str:
            if isinstance(value, bool) and str(value).lower() in (field.metadata.get("choices") or ()):
                return str(value).lower()  # of auto, true, false
            if isinstance(value, str | int | float) and not isinstance(value, bool):
                return str(value)
        elif kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        elif isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
            return value
    bounds = allowed(field.metadata)
    raise ConfigError(f"{key}={value!r} is not allowed: it must be {bounds or _type_text(hint)}{_unit(bounds, hint)}")


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union; else the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _unit(bounds: str, hint: Any) -> str:
    return f" ({_type_text(hint)})" if bounds else ""


def _type_text(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_type_text(kind) for kind in get_args(hint))
    if get_origin(hint) is list:
        return "a list, as [a,b]" if get_args(hint) == (str,) else "a list of whole numbers, as [4,2]"
    return "names with values, as {A:1,B:2}" if get_origin(hint) is dict else names.get(hint, str(hint))


def _group_of(root: Any, name: str) -> Any:
    """The dataclass of a field that is a group of keys, or None."""
    hint = get_type_hints(root)[name]
    return hint if dataclasses.is_dataclass(hint) else None
