"""``longctx train``: checks what it was given, starts the ranks and tells how it went; one run, or a sweep of them."""

import dataclasses
import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longctx.cli.stop_signals import ask_on_signals
from longctx.errors import ConfigError, LongctxError
from longctx.models.checkpoint import absolute_path
from longctx.training.config import TrainConfig
from longctx.training.data.sources import DEMO_NAMES
from longctx.training.gang import StoppedError
from longctx.training.output_lock import lock_output
from longctx.training.preflight import check_config, check_cores, check_files
from parallel.registry import Registry

logger = logging.getLogger(__name__)

LAUNCHERS = Registry(
    "launcher",
    {"local": "longctx.training.launch:launch_locally", "ray": "cluster.train_launch:launch_on_ray"},
)
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def train(config: TrainConfig) -> int:
    """Run one training; returns the exit code."""
    report = _run(_prepare(config))
    return EXIT_INTERRUPTED if report is None else 0


def sweep(runs: list[tuple[TrainConfig, tuple[str, ...]]]) -> int:
    """Run several trainings one after the other, each in a folder ``sweep-N`` of its output, and print a table.

    One that fails does not keep the others from running; a signal ends all. Returns the first exit code that is not 0.
    """
    prepared = [
        (_prepare(dataclasses.replace(config, output=str(Path(config.output) / f"sweep-{index}"))), swept)
        for index, (config, swept) in enumerate(runs)
    ]
    rows: list[tuple[str, tuple[str, ...], dict[str, Any] | str]] = []
    codes: list[int] = []
    for config, swept in prepared:
        print(f"sweep {len(rows) + 1} of {len(prepared)}: {' '.join(swept)}", file=sys.stderr)
        try:
            report = _run(config)
            codes.append(EXIT_INTERRUPTED if report is None else 0)
            rows.append((config.output, swept, "interrupted" if report is None else report))
        except LongctxError as error:
            print(f"error: {error}", file=sys.stderr)
            codes.append(EXIT_USAGE if isinstance(error, ValueError) else EXIT_FAILED)
            rows.append((config.output, swept, f"error: {str(error).splitlines()[0]}"))
        if codes[-1] == EXIT_INTERRUPTED:
            break
    print(describe_sweep(rows))
    return next((code for code in codes if code), 0)


def describe_sweep(rows: list[tuple[str, tuple[str, ...], dict[str, Any] | str]]) -> str:
    """A table: what was swept, the figures of the reports or why there is none, and where each run is."""
    reports = [report for _, _, report in rows if isinstance(report, dict)]
    figures = [name for name, value in (reports[0] if reports else {}).items() if isinstance(value, int | float)]
    keys = [text.partition("=")[0] for text in rows[0][1]]
    table = [[*keys, *figures, "output"]]
    for output, swept, report in rows:
        values = [text.partition("=")[2] for text in swept]
        if isinstance(report, dict):
            table.append([*values, *(_show(report.get(name)) for name in figures), output])
        else:
            table.append([*values, *("-" for _ in figures), f"{output}  {report}"])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def _prepare(config: TrainConfig) -> TrainConfig:
    """The configuration as ranks get it, checked: with absolute paths, and the launcher chosen."""
    check_config(config)
    model, data, parallel = config.model, config.data, config.parallel
    model = dataclasses.replace(model, path=absolute_path(model.path))
    paths = {name: _absolute(getattr(data, name)) for name in ("path", "eval_path", "chat_template")}
    cluster, has_ray = config.cluster, find_spec("ray") is not None
    if cluster.launcher == "auto":
        cluster = dataclasses.replace(cluster, launcher="ray" if has_ray else "local")
    if cluster.launcher == "ray" and not has_ray:
        raise ConfigError("cluster.launcher=ray is not allowed: Ray is not installed; cluster.launcher=local")
    if cluster.launcher == "local" and cluster.address is not None:
        raise ConfigError(
            f"cluster.address={cluster.address} is not allowed with plain processes: cluster.launcher=ray "
            "(and Ray installed) joins a Ray cluster"
        )
    config = dataclasses.replace(
        config,
        output=os.path.abspath(config.output),
        model=model,
        data=dataclasses.replace(data, **paths),
        peft=dataclasses.replace(config.peft, path=_absolute(config.peft.path)),
        parallel=dataclasses.replace(parallel, links_file=_absolute(parallel.links_file)),
        cluster=cluster,
    )
    if cluster.address is None:
        check_files(config)
        if cluster.launcher == "ray":
            check_cores(config)
    return config


def _run(config: TrainConfig) -> dict[str, Any] | None:
    """Rank 0's report; None if a signal ended the run before its end, which the same command goes on from."""
    with lock_output(Path(config.output)), ask_on_signals() as asked:
        try:
            report = LAUNCHERS.get(config.cluster.launcher)(config, stop=asked)
        except StoppedError:
            return None
        if report["stopped"]:
            logger.info("stopped; the same command goes on from %s", config.output)
            return None
        return report


def _absolute(path: str | None) -> str | None:
    return path if not path or path in DEMO_NAMES else os.path.abspath(path)


def _show(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
