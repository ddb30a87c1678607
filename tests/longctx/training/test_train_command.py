"""``longctx train`` as a user runs it, killed at random moments, frozen, interrupted and out of disk space."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from longctx.training.checkpoints import list_checkpoints
from tests.longctx.training.worlds import read_losses, write_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
NUM_STEPS = 40


def start(output: Path, *overrides: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    rows = output.parent / "rows.jsonl"
    if not rows.exists():
        write_rows(rows)
    words = [
        *(sys.executable, "-m", "longctx.cli.main", "train", "cluster.launcher=local"),
        *(f"output={output}", f"data.path={rows}", "model.dtype=float32", "model.device=cpu", "logger.peak_flops=1e9"),
        *(f"train.num_steps={NUM_STEPS}", "train.context_length=128", "train.batch_size=2", "checkpoint.every=3"),
        *("parallel.sp_degree=2", "parallel.timeout_s=20", "optimizer.lr=1e-3", *overrides),
    ]
    return subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | (env or {})
    )


def find_ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """In the order of their starts."""
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):  # a zombie, too
            if "longctx.training.rank_process" in child.cmdline():
                found.append(child)
    return found


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until it is in the metrics."""
    deadline = time.monotonic() + 120
    path = output / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.02)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Losses of a run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    finish(start(output))
    return read_losses(output)


def test_kill_9_at_random_moments(tmp_path, whole):
    """Of a rank, of all ranks and of the launcher: the losses are those of a run that nothing interrupts."""
    output, moments = tmp_path / "run", random.Random(os.getpid())
    for victim in ("one", "all", "launcher"):
        process = start(output)
        done = len((output / "metrics.jsonl").read_text().splitlines()) if (output / "metrics.jsonl").exists() else 0
        ranks: list[psutil.Process] = []
        while len(ranks) < 2:
            ranks = find_ranks(process)
        wait_for_step(output, min(done + 2, NUM_STEPS - 4), process)
        time.sleep(moments.random())
        targets = {"one": [moments.choice(ranks)], "all": ranks, "launcher": [psutil.Process(process.pid)]}[victim]
        for target in targets:
            target.kill()
        if victim == "launcher":
            finish(process, -signal.SIGKILL)
            continue
        # The gang starts again by itself; then the launcher is interrupted, so that the next round finds work left.
        deadline = time.monotonic() + 60
        while not (again := find_ranks(process)) or again[0].pid in {rank.pid for rank in ranks}:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert "starting all ranks again from the last checkpoint (1 of 3)" in finish(process, 130)
    finish(start(output))
    assert read_losses(output) == whole
    left = [path.name for path in (output / "checkpoints").iterdir()]
    assert sorted(left) == [path.name for path in list_checkpoints(output)]


def test_a_frozen_rank_ends_by_the_timeout(tmp_path, whole):
    output = tmp_path / "run"
    process = start(output, "parallel.timeout_s=5")
    wait_for_step(output, 5, process)
    frozen = find_ranks(process)[1]
    frozen.suspend()
    told = finish(process)
    assert "starting all ranks again from the last checkpoint (1 of 3)" in told
    assert not is_running(frozen)
    assert read_losses(output) == whole


def test_interrupted_it_saves_and_goes_on(tmp_path, whole):
    output = tmp_path / "run"
    process = start(output)
    wait_for_step(output, 4, process)
    process.send_signal(signal.SIGTERM)
    told = finish(process, 130)
    assert "Traceback" not in told
    done = len(read_losses(output))
    assert list_checkpoints(output)[-1].name == f"step-{done:08d}"
    finish(start(output))
    assert read_losses(output) == whole


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """Room for one checkpoint of 36 MB and a half."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=90m", "tmpfs", str(small)], check=True)
    try:
        output = small / "run"
        write_rows(tmp_path / "rows.jsonl")
        keys = (f"data.path={tmp_path}/rows.jsonl", "checkpoint.keep_last=5", "train.num_steps=12")
        told = finish(start(output, *keys), 1)
        assert "Traceback" not in told
        assert re.search(r"ERROR .*checkpoint of step \d+ was not written: .*No space left on device", told)
        assert re.search(
            r"error: the checkpoint of step 12 could not be written .*last good checkpoint is .*step-", told
        )
        good = list_checkpoints(output)
        assert good
        assert len(list((output / "checkpoints").iterdir())) == len(good)
        subprocess.run(["mount", "-o", "remount,size=400m", str(small)], check=True)
        finish(start(output, *keys))
        assert len(read_losses(output)) == 12
        assert (output / "final" / "model.safetensors").is_file()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_no_compiler_is_needed(tmp_path):
    """The path has nothing but the interpreter."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    output = tmp_path / "run"
    finish(start(output, "train.num_steps=2", "deepspeed.zero_stage=2", env={"PATH": str(folder)}))
    assert len(read_losses(output)) == 2
