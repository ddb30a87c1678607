"""Entry point of the ``longctx`` command.

Keys and values are checked before anything heavy is imported: a mistake costs a fraction of a second.
"""

import logging
import os
import sys
import traceback

import longctx
from longctx.cli.command_line import HELP, parse
from longctx.cli.commands import COMMANDS
from longctx.cli.help import describe_commands, describe_keys
from longctx.cli.sweep import Run, expand_sweep
from longctx.config import compose
from longctx.config_text import to_yaml
from longctx.errors import CheckpointError, ConfigError, LongctxError
from longctx.terminal_log import LOG_FORMAT
from parallel.registry import load

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(describe_commands())
        return 0
    if words[1:] and words[1] in HELP and any(name.startswith(f"{words[0]} ") for name in COMMANDS):
        print(describe_commands(words[0]))
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
    line = parse(words)
    command = line.command
    if line.shows_help:
        print(describe_keys(command))
        return 0
    root = load(command.root)
    runs = expand_sweep(line.overrides) if line.sweeps else [Run((), line.overrides)]
    configs = [compose(root, command.config_name, run.overrides, config_dir=line.config_dir) for run in runs]
    if line.shows_config:
        print("---\n".join(to_yaml(config) for config in configs), end="")
        return 0
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    for noisy in ("httpx", "httpcore", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and our worker processes do not mix
    if line.sweeps:
        return load(command.sweep or "")([(config, run.swept) for config, run in zip(configs, runs, strict=True)])
    return load(command.entry)(configs[0], *([line.carried] if command.is_carrier else []))


def _fail(message: str, code: int, shows_traceback: bool) -> int:
    if shows_traceback:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
