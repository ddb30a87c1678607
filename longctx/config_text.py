"""A configuration as YAML, with the comment of every key: what ``--cfg job`` prints, and Hydra reads again."""

import dataclasses
from typing import Any

from parallel.option import allowed


def to_yaml(config: Any, indent: str = "") -> str:
    """``config``'s keys in their order, groups indented; ends with a newline."""
    lines: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            title = (type(value).__doc__ or "").partition("\n")[0]
            lines += [f"{indent}# {title}", f"{indent}{field.name}:", to_yaml(value, indent + "  ").rstrip("\n")]
        else:
            bounds = allowed(field.metadata)
            comment = field.metadata.get("comment", "") + (f" [{bounds}]" if bounds else "")
            lines.append(f"{indent}{field.name}: {_show(value)}  # {comment}")
    return "\n".join(lines) + "\n"


def _show(value: Any) -> str:
    import yaml  # comes with OmegaConf

    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")
