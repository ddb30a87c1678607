"""What ``--help`` prints: the commands, and every key of one command with its default and comment."""

import dataclasses
from typing import Any

from longctx.cli.commands import COMMANDS, Command
from longctx.config import CONFIG_FOLDER, EXPERIMENT, folder_of, list_keys, list_options, takes_experiments
from parallel.option import allowed
from parallel.registry import load

_KEY_WIDTH = 40


def describe_commands(family: str = "") -> str:
    """The text of ``longctx --help``, or of ``longctx <family> --help``: those whose names begin with that word."""
    commands = [command for name, command in COMMANDS.items() if name.startswith(f"{family} " if family else "")]
    width = max(len(command.name) for command in commands) + 2
    lines = ["usage: longctx <command> [--config-dir DIR] [--cfg job] [--traceback] [key=value ...]", "", "commands:"]
    lines += [f"  {command.name:<{width}}{command.comment}" for command in commands]
    lines += ["", "longctx <command> --help lists the command's keys; longctx --version prints the version."]
    return "\n".join(lines)


def describe_keys(command: Command) -> str:
    """The text of ``longctx <command> --help``."""
    lines = [f"usage: longctx {command.name} [flags] [key=value ...]", "", command.comment, ""]
    if command.is_carrier:
        lines[0] += " <command> [flags] [key=value ...]"
    lines += [
        "  --config-dir DIR   a folder of your own YAML, laid out as longctx's configs",
        "  --cfg job          print the configuration and end",
        "  --traceback        show where an error came from",
    ]
    if command.sweep is not None:
        lines.append("  -m, --multirun     one run after the other for each combination of key=A,B")
    root = load(command.root)
    if takes_experiments(command.config_name):
        there = ", ".join(list_options(EXPERIMENT, [CONFIG_FOLDER])) or "NAME.yaml of your own"
        lines += ["", f"{EXPERIMENT}=NAME sets keys of several groups: {there}"]
    group = None
    for key, field in list_keys(root).items():
        if key.rpartition(".")[0] != group:
            group = key.rpartition(".")[0]
            lines += ["", *_describe_group(group, folder_of(root, group))]
        shown = f"  {key}={_show(field)}"
        gap = "\n" + " " * _KEY_WIDTH if len(shown) >= _KEY_WIDTH else " " * (_KEY_WIDTH - len(shown))
        bounds = allowed(field.metadata)
        lines.append(f"{shown}{gap}{field.metadata.get('comment', '')}" + (f" [{bounds}]" if bounds else ""))
    return "\n".join(lines)


def _describe_group(group: str, folder: str) -> list[str]:
    options = list_options(folder, [CONFIG_FOLDER]) if group else []
    return [f"{group}:" + (f"  ({group}=NAME takes {', '.join(options)})" if options else "")] if group else []


def _show(field: dataclasses.Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
