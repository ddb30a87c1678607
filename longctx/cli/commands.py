"""The table of commands. Targets are ``"module:attribute"`` strings: nothing is imported before its command runs."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    ``root`` is the dataclass of its configuration, ``entry`` a function of such an object that returns the exit code.
    The primary YAML is ``configs/<name>.yaml``.
    """

    name: str
    comment: str
    root: str
    entry: str


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "serve",
            "serve a model behind an OpenAI-compatible endpoint, prefill and decode apart, on Ray",
            "cluster.config:ServeConfig",
            "cluster.launch:serve",
        ),
        Command(
            "generate",
            "continue a prompt or ask about a document, here and now, without Ray",
            "longctx.cli.generate_config:GenerateCommandConfig",
            "longctx.cli.generate:generate",
        ),
        Command(
            "status",
            "show what runs where: workers, pages, queue",
            "cluster.config:StatusConfig",
            "cluster.status:status",
        ),
    )
}


def load(target: str) -> Any:
    """The object behind ``"module:attribute"``."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)
