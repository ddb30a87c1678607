"""Serving speed of longctx and its peers, interleaved on one machine; prints JSON.

    python -m benchmarks.serving --quick
    python -m benchmarks.serving --models 110m 450m --save serving
    python -m benchmarks.serving --engines longctx-engine transformers --device cuda --models 8b

All engines run at one time and one is loaded at a time. README.md, next to this file, says what is measured, and how.
"""

import argparse
import json
import logging
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.checkpoints import SHAPES, Shape, ensure_checkpoint
from benchmarks.machine import REPOSITORY, describe_commit, describe_machine, describe_versions
from benchmarks.peers import ENGINES, Engine, Launch, SkippedError
from benchmarks.report import describe_cells, make_table, round_floats
from benchmarks.timings import Limits
from benchmarks.waves import Cell, Grid

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).parent / "results"
LIMITS_TIMEOUT_S = 300.0
ADD = "one more engine with arguments or overrides of its own, as: --add vllm-32 vllm '--block-size 32'"
MIN_ROUNDS = 5  # of a result that is kept
FULL = {"lengths": [1024, 8192, 32768], "streams": [1, 4, 16], "outputs": 64, "rounds": 5}
QUICK = {"lengths": [1024, 8192], "streams": [1, 4], "outputs": 32, "rounds": 3}


def main() -> int:
    """Run what the arguments ask for; the exit code is 1 when an engine failed."""
    options = parse_arguments(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    signal.signal(signal.SIGTERM, _exit_on_signal)
    result: dict[str, Any] = {
        "benchmark": "serving",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]]),
        **describe_commit(),
        "hardware": describe_machine(),
        "versions": describe_versions(),
        "baseline": options.baseline,
        "settings": {name: value for name, value in vars(options).items() if name not in ("work", "save")},
        "models": {},
    }
    has_failed = False
    for name in options.models:
        has_failed |= not run_model(name, options, result)
    print(json.dumps(round_floats(result), indent=2))
    return 1 if has_failed else 0


def run_model(name: str, options: argparse.Namespace, result: dict[str, Any]) -> bool:
    """All rounds of one model; fills ``result["models"][name]`` and says whether every engine held out."""
    shape = SHAPES[name]
    checkpoint = ensure_checkpoint(name, options.work)
    logger.info("%s: measuring the machine's limits", name)
    measured = [_measure_limits(name, options.device)]
    cells = [Cell(length, streams, options.outputs) for length in options.lengths for streams in options.streams]
    launch = _plan_launch(shape, checkpoint, cells, options)
    report: dict[str, Any] = {"shape": _describe_shape(shape), "kv_gib": launch.kv_gib, "limits": measured}
    result["models"][name] = report
    with ExitStack() as stack:
        engines, report["engines"] = _start_engines(options.engines, launch, stack, timeout_s=options.start_timeout_s)
        grid = Grid(cells, engines, vocab_size=shape.vocab_size, seed=options.seed, timeout_s=options.wave_timeout_s)
        logger.info("%s: warm-up round", name)
        grid.warm_up()
        for round_idx in range(1, options.rounds + 1):
            grid.run_round(round_idx)
            report["cells"] = describe_cells(grid, shape, _best_limits(measured), baseline=options.baseline)
            _save(result, options.save)
    measured.append(_measure_limits(name, options.device))  # again: the machine may have been busy
    report["cells"] = describe_cells(grid, shape, _best_limits(measured), baseline=options.baseline)
    for engine in engines:
        report["engines"][engine.name]["peak_device_bytes"] = engine.device_bytes
        if engine.name in grid.failed:
            report["engines"][engine.name]["failed"] = grid.failed[engine.name]
    _save(result, options.save)
    logger.info("%s, medians of %d rounds:\n%s", name, options.rounds, make_table(report["cells"]))
    return not any("failed" in engine for engine in report["engines"].values())


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with the grid's defaults filled in; ends the program on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes: 1K and 8K, 1 and 4 streams, 3 rounds")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["110m"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument(
        "--add", nargs=3, action="append", default=[], metavar=("NAME", "ENGINE", "ARGUMENTS"), help=ADD
    )
    parser.add_argument("--baseline", default="vllm", help="name of the engine that ratios are taken of")
    parser.add_argument("--lengths", nargs="+", type=int, help="prompt tokens")
    parser.add_argument("--streams", nargs="+", type=int, help="requests sent together")
    parser.add_argument("--outputs", type=int, help="output tokens of each request")
    parser.add_argument("--rounds", type=int, help=f"timed rounds; at least {MIN_ROUNDS} with --save")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--max-kv-gib", type=int, default=4, help="most KV memory of each worker")
    parser.add_argument("--seed", type=int, default=time.time_ns(), help="of the prompts; default: a new one")
    parser.add_argument("--work", type=Path, default=Path("/tmp/longctx-bench"), help="folder of checkpoints and logs")
    parser.add_argument("--save", metavar="NAME", help="also write benchmarks/results/NAME.json, round by round")
    parser.add_argument("--start-timeout-s", type=float, default=900.0, help="for all engines to be ready")
    parser.add_argument("--wave-timeout-s", type=float, default=1800.0, help="for one load of one engine")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name, minimum in (("lengths", 1), ("streams", 1), ("outputs", 2), ("rounds", 1), ("max_kv_gib", 1)):
        values = getattr(options, name)
        if min(values if isinstance(values, list) else [values]) < minimum:
            parser.error(f"--{name.replace('_', '-')}: must be at least {minimum}")
    kinds = {name: name for name in options.engines} | {name: kind for name, kind, _ in options.add}
    for name, kind in kinds.items():
        if kind not in ENGINES:
            parser.error(f"--add {name} {kind}: no such engine; allowed: {', '.join(ENGINES)}")
    options.engines = kinds
    if options.save and options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds={options.rounds} is too few for a result that is kept; at least {MIN_ROUNDS}")
    return options


def _start_engines(
    kinds: Mapping[str, str], launch: Launch, stack: ExitStack, *, timeout_s: float
) -> tuple[list[Engine], dict[str, dict[str, Any]]]:
    """Start all engines together. Returns those that are ready, and what to say about each.

    ``kinds`` maps their names to keys of ``ENGINES``.
    """
    reports: dict[str, dict[str, Any]] = {}
    started: list[Engine] = []
    start_s = time.monotonic()
    for name, kind in kinds.items():
        try:
            engine = ENGINES[kind](launch, name)
        except SkippedError as reason:
            logger.info("%s is skipped: %s", name, reason)
            reports[name] = {"skipped": str(reason)}
            continue
        stack.callback(engine.tree.stop)
        started.append(engine)
    ready: list[Engine] = []
    for engine in started:
        try:
            engine.wait_ready(start_s + timeout_s)
        except (RuntimeError, TimeoutError) as error:
            logger.error("%s does not start: %s", engine.name, error)
            reports[engine.name] = engine.settings | {"failed": str(error)}
            continue
        logger.info("%s is ready after %.0f s", engine.name, time.monotonic() - start_s)
        reports[engine.name] = engine.settings | {"memory_at_start_bytes": engine.tree.memory_bytes()}
        ready.append(engine)
    return ready, reports


def _plan_launch(shape: Shape, checkpoint: Path, cells: Sequence[Cell], options: argparse.Namespace) -> Launch:
    """A context and a KV budget that the largest load fits, the budget within ``--max-kv-gib``."""
    contexts = {cell: cell.num_prompt_tokens + cell.num_output_tokens for cell in cells}
    most_tokens = max(context * cell.num_streams for cell, context in contexts.items())
    kv_gib = math.ceil(1.1 * most_tokens * shape.kv_bytes_per_token / 2**30)
    logs = options.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return Launch(
        checkpoint,
        logs,
        max_context=max(contexts.values()) + 64,
        kv_gib=min(kv_gib, options.max_kv_gib),
        device=options.device,
        extra={name: arguments for name, _, arguments in options.add},
    )


def _measure_limits(model: str, device: str) -> dict[str, Any]:
    """In a process of its own, so that the load generator stays small."""
    command = [sys.executable, "-m", "benchmarks.limits", "--shape", model, "--device", device]
    done = subprocess.run(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, timeout=LIMITS_TIMEOUT_S, check=True
    )
    return json.loads(done.stdout)


def _best_limits(measured: Sequence[dict[str, Any]]) -> Limits:
    best = {name: max(run["best"][name] for run in measured) for name in measured[0]["best"]}
    return Limits(best["matmul_tflops"] * 1e12, best["read_gb_per_s"] * 1e9)


def _describe_shape(shape: Shape) -> dict[str, Any]:
    fields = {name: getattr(shape, name) for name in shape.__slots__}
    return fields | {"num_parameters": shape.num_parameters, "kv_bytes_per_token": shape.kv_bytes_per_token}


def _save(result: dict[str, Any], name: str | None) -> None:
    if name is not None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(round_floats(result), indent=2) + "\n")


def _exit_on_signal(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
