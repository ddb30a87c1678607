"""Seconds to a training's first step on a machine without a compiler: the demo model, defaults, one rank, on CPUs.

python -m benchmarks.first_step [--tokens 2048] [--rounds 5] [--save first-step]

Ways are launchers times element types, in turns. ``from_command_s`` counts from the command's start to the line of its
first step, ``from_rank_s`` from the start of the rank's process. PATH holds what it held before, compilers left out.
"""

import argparse
import itertools
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.machine import describe_run, keep_result
from benchmarks.report import round_floats

COMPILER = re.compile(r"(.*-)?(gcc|g\+\+|cc|c\+\+|clang|clang\+\+|c89|c99|tcc|icx|nvcc)(-[\d.]+)?")
RANKS = ("longctx.training.rank_process", "ray::TrainRank")  # in the command lines of ranks, by launcher
TIMEOUT_S = 300.0
END_S = 60.0


def measure(launcher: str, dtype: str, *, num_tokens: int, path: Path, folder: Path) -> dict[str, float]:
    """One run, ended after its first step."""
    words = [sys.executable, "-m", "longctx.cli.main", "train", f"data.path={_write_data(folder)}"]
    words += [f"output={folder / 'run'}", f"train.context_length={num_tokens}", "train.num_steps=1"]
    words += [f"cluster.launcher={launcher}", f"model.dtype={dtype}", "model.device=cpu", "checkpoint.export=false"]
    begun = time.time()
    with (folder / "log").open("wb") as log:
        process = psutil.Popen(words, env=os.environ | {"PATH": str(path)}, stdout=log, stderr=log)
    started = None
    while "step 1/1" not in (text := (folder / "log").read_text()):
        if process.poll() is not None or time.time() > begun + TIMEOUT_S:
            process.kill()
            raise RuntimeError(f"no first step:\n{text}")
        started = started or _find_rank(process)
        time.sleep(0.02)
    ended = time.time()
    process.send_signal(signal.SIGTERM)
    process.wait(END_S)
    assert started is not None
    return {"from_command_s": ended - begun, "from_rank_s": ended - started}


def strip_compilers(folder: Path) -> Path:
    """A folder for PATH with links to all that PATH has, compilers left out."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).glob("*"):
            if not COMPILER.fullmatch(program.name):
                with suppress(FileExistsError):  # an earlier folder's comes first
                    (folder / program.name).symlink_to(program)
    return folder


def _write_data(folder: Path) -> Path:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"{number} is a number. " * 50}) + "\n" for number in range(200)))
    return data


def _find_rank(process: psutil.Process) -> float | None:
    """When the rank's process was started; None: not yet."""
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any(name in " ".join(child.cmdline()) for name in RANKS):
                return child.create_time()
    return None


def main() -> None:
    """Measure, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", default=["ray", "local"])
    parser.add_argument("--dtypes", nargs="+", default=["auto"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    args = parser.parse_args()
    ways = list(itertools.product(args.launchers, args.dtypes))
    times: dict[str, list[dict[str, float]]] = {" ".join(way): [] for way in ways}
    started = describe_run("first_step")
    with tempfile.TemporaryDirectory() as root:
        path = strip_compilers(Path(root) / "bin")
        for turn, (launcher, dtype) in itertools.product(range(args.rounds), ways):
            folder = Path(root) / f"{turn}-{launcher}-{dtype}"
            folder.mkdir()
            seconds = measure(launcher, dtype, num_tokens=args.tokens, path=path, folder=folder)
            times[f"{launcher} {dtype}"].append(seconds)
            print(launcher, dtype, round_floats(seconds), file=sys.stderr)
    content = started | {
        "num_tokens": args.tokens,
        "limit_s": 10.0,
        "ways": {
            way: {name: statistics.median(each[name] for each in rounds) for name in rounds[0]} | {"rounds": rounds}
            for way, rounds in times.items()
        },
    }
    print(json.dumps(round_floats(content), indent=1))
    keep_result(round_floats(content), args.save)


if __name__ == "__main__":
    main()
