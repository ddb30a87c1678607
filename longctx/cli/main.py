"""Entry point of the ``longctx`` command.

Keys and values are checked before anything heavy is imported: a mistake costs a fraction of a second.
"""

import difflib
import logging
import os
import sys
import traceback
from pathlib import Path

import longctx
from longctx.cli.commands import COMMANDS, Command, load
from longctx.cli.help import describe_commands, describe_keys
from longctx.config import compose
from longctx.errors import CheckpointError, ConfigError, LongctxError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(describe_commands())
        return 0
    if words[0] == "--version":
        print(f"longctx {longctx.__version__}")
        return 0
    shows_traceback = "--traceback" in words
    try:
        return _run([word for word in words if word != "--traceback"])
    except (ConfigError, CheckpointError) as error:
        return _fail(str(error), EXIT_USAGE, shows_traceback)
    except LongctxError as error:
        return _fail(str(error), EXIT_FAILED, shows_traceback)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED, shows_traceback)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: the interpreter's flush too
        return EXIT_FAILED


def _run(words: list[str]) -> int:
    command, rest = _find_command(words)
    if any(word in ("-h", "--help") for word in rest):
        print(describe_keys(command))
        return 0
    rest, config_dir = _take_config_dir(rest)
    config = compose(load(command.root), command.config_name, rest, config_dir=config_dir)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    for noisy in ("httpx", "httpcore", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and our worker processes do not mix
    return load(command.entry)(config)


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


def _take_config_dir(words: list[str]) -> tuple[list[str], Path | None]:
    for i, word in enumerate(words):
        if word == "--config-dir":
            if i + 1 == len(words):
                raise ConfigError("--config-dir needs a folder")
            return words[:i] + words[i + 2 :], Path(words[i + 1])
        if word.startswith("--config-dir="):
            return words[:i] + words[i + 1 :], Path(word.partition("=")[2])
    return words, None


def _fail(message: str, code: int, shows_traceback: bool) -> int:
    if shows_traceback:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
