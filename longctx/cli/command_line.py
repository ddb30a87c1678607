"""What the words of a command line mean, before anything is composed."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from longctx.cli.commands import COMMANDS, Command
from longctx.errors import ConfigError

HELP, SWEEP = ("-h", "--help"), ("-m", "--multirun")


@dataclass(frozen=True, slots=True)
class CommandLine:
    """One command with all that it was given."""

    command: Command
    overrides: list[str]
    config_dir: Path | None
    shows_help: bool
    shows_config: bool  # --cfg job
    sweeps: bool
    carried: list[str]  # the command line that a carrier takes


def parse(words: list[str]) -> CommandLine:
    """Raises ``ConfigError`` for a command or flag that does not exist."""
    command, rest = _find_command(words)
    rest, carried = _split_carried(command, rest) if command.is_carrier else (rest, [])
    rest, config_dir = _take_value(rest, "--config-dir", "a folder")
    rest, cfg = _take_value(rest, "--cfg", "job")
    if cfg not in (None, "job"):
        raise ConfigError(f"--cfg {cfg} is not allowed; allowed: job")
    sweeps = any(word in SWEEP for word in rest)
    if sweeps and command.sweep is None:
        able = ", ".join(name for name, each in COMMANDS.items() if each.sweep is not None)
        raise ConfigError(f"{SWEEP[0]} is not for {command.name}; allowed for: {able}")
    return CommandLine(
        command,
        [word for word in rest if word not in HELP + SWEEP],
        None if config_dir is None else Path(config_dir),
        any(word in HELP for word in rest),
        cfg is not None,
        sweeps,
        carried,
    )


def _find_command(words: list[str]) -> tuple[Command, list[str]]:
    """The command that the first word or two name, and the words after it."""
    for count in (2, 1):
        if (command := COMMANDS.get(" ".join(words[:count]))) is not None:
            return command, words[count:]
    begun = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    name = " ".join(words[: 2 if begun else 1])
    close = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"command {name!r} is unknown{hint}; allowed: {', '.join(begun or COMMANDS)}")


def _split_carried(command: Command, words: list[str]) -> tuple[list[str], list[str]]:
    """A carrier's own words, and those of the command that it carries: its keys may stand anywhere."""
    start = 0
    while start < len(words) and (words[start].startswith("-") or "=" in words[start]):
        start += 2 if words[start] in ("--config-dir", "--cfg") else 1
    is_own = [index < start or word.startswith(f"{command.name}.") for index, word in enumerate(words)]
    return (
        [word for word, own in zip(words, is_own, strict=True) if own],
        [word for word, own in zip(words, is_own, strict=True) if not own],
    )


def _take_value(words: list[str], flag: str, what: str) -> tuple[list[str], str | None]:
    for index, word in enumerate(words):
        if word == flag:
            if index + 1 == len(words):
                raise ConfigError(f"{flag} needs {what}")
            return words[:index] + words[index + 2 :], words[index + 1]
        if word.startswith(f"{flag}="):
            return words[:index] + words[index + 1 :], word.partition("=")[2]
    return words, None
