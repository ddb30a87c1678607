"""Ranks as actors of a real Ray: they meet, are lost and started again, and what does not fit is said at once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cli_server import wait_until
from tests.cluster.gang_scenarios import SCENARIOS
from tests.longctx.gang_body import make_config, read_seen

ROOT = Path(__file__).parent.parent.parent
COMMAND = (sys.executable, "-m", "tests.longctx.train_command", "train", "cluster.launcher=ray", "data.path=README.md")


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """Folder, answers by scenario, and what was printed."""
    folder = tmp_path_factory.mktemp("gangs")
    words = [sys.executable, "-m", "tests.cluster.gang_scenarios", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return folder, dict(zip(SCENARIOS, answers, strict=True)), done.stderr


def test_ranks_meet(scenarios):
    folder, answers, printed = scenarios
    assert answers["meet"] == {"rank": 0, "restart": 0, "loss": 0.5, "stopped": False}
    seen = read_seen(folder / "meet")
    assert [(each["global_rank"], each["local_rank"], each["local_world_size"]) for each in seen] == [
        (0, 0, 2),
        (1, 1, 2),
    ]
    assert not any(each["torch"] for each in seen)
    assert {(folder / "meet" / f"sum-{rank}.json").read_text() for rank in range(2)} == {"1.0"}
    assert "INFO trainer: a step" in printed  # rank 0's lines arrive here
    assert "WARNING rank 1 trainer: a warning" in printed
    assert "rank 1 trainer: a step" not in printed


def test_a_lost_rank_starts_all_again_in_fresh_processes(scenarios):
    folder, answers, printed = scenarios
    assert answers["lost"]["restart"] == 2
    pids = [seen["pid"] for restart in range(3) for seen in read_seen(folder / "lost", restart)]
    assert len(set(pids)) == len(pids) == 6
    assert "rank 1 on node" in printed
    assert "was lost: The actor is dead because its worker process has died" in printed
    assert "starting all ranks again from the last checkpoint (2 of 3)" in printed
    assert "rank 0 on node" in answers["lost too often"]["error"]


def test_what_would_come_again_is_not_tried_again(scenarios):
    folder, answers, _ = scenarios
    assert answers["refused"] == {"error": "/data/model: no weights", "kind": "CheckpointError"}
    assert read_seen(folder / "refused", 1) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too many", ["6 ranks (parallel.dp_degree=2 x parallel.sp_degree=3)", "1 nodes have 2 CPUs", "room for 2"]),
        ("no gpus", ["0.5 CPUs and 1 GPUs each", "and 0 GPUs, they have room for 0"]),
        ("no nodes", ["STRICT_SPREAD", "1 have room for one"]),
    ],
)
def test_too_many_ranks_are_refused_at_once(scenarios, name, words):
    folder, answers, _ = scenarios
    for word in words:
        assert word in answers[name]["error"]
    assert read_seen(folder / name) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_signals(tmp_path, number):
    """The command as a user runs it: Ctrl-C lets ranks save; after SIGKILL everything of it ends by itself."""
    act = "wait" if number == signal.SIGINT else "hang"
    make_config(tmp_path, acts=[{"rank": rank, "act": act} for rank in range(2)])
    words = [*COMMAND, f"output={tmp_path}", "parallel.sp_degree=2", "cluster.cpus_per_rank=0.5"]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"COLUMNS": "80"}
    )
    wait_until(lambda: len(read_seen(tmp_path)) == 2, 120, lambda: process.poll())
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 3
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    if number == signal.SIGINT:
        assert process.returncode == 130, output
        assert "Traceback" not in output
        assert [json.loads((tmp_path / f"stopped-{rank}.json").read_text()) for rank in range(2)] == [True, True]
    wait_until(lambda: not [each for each in family if is_running(each)], 150, lambda: family)


def is_running(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
