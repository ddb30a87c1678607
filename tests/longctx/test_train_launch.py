"""Ranks as plain processes: they meet, they are lost and started again, they stop, and nothing of them is left."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from longctx.errors import CheckpointError, ConfigError, LongctxError, WorkerLostError
from longctx.training.gang import settle, supervise
from longctx.training.launch import launch_locally
from longctx.training.place import RankOutcome, make_places, order_ranks
from tests.cli_server import wait_until
from tests.longctx.gang_body import BODY, NotFiniteError, make_config, read_seen

REPORT = {"rank": 0, "restart": 0, "loss": 0.5, "stopped": False}
ROOT = Path(__file__).parent.parent.parent
COMMAND = (
    sys.executable,
    "-m",
    "tests.longctx.train_command",
    "train",
    "cluster.launcher=local",
    "data.path=README.md",
)


def run(config, stop=None):
    return launch_locally(config, stop=stop or threading.Event(), body=BODY)


def start_command(folder, *overrides, acts, num_ranks=2):
    make_config(folder, acts=acts)
    words = [*COMMAND, f"output={folder}", f"parallel.sp_degree={num_ranks}", *overrides]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_ranks(folder, num_ranks=2):
    """Their process ids."""
    wait_until(lambda: len(read_seen(folder)) == num_ranks)
    return [seen["pid"] for seen in read_seen(folder)]


@pytest.mark.parametrize(
    ("nodes", "order"),
    [
        (["a"], [0]),
        (["a", "b", "a", "b"], [0, 2, 1, 3]),
        (["a", "b", "c", "b"], [1, 3, 0, 2]),  # b's two stay a pair
        (["a", "b", "b", "a", "b"], [1, 2, 4, 0, 3]),
    ],
)
def test_ranks_of_a_node_are_neighbours(nodes, order):
    assert order_ranks(nodes) == order


def test_places():
    places = make_places(["b", "b", "a"], address="10.0.0.2", port=99, restart=1)
    assert [(p.global_rank, p.node, p.local_rank, p.local_world_size) for p in places] == [
        (0, "b", 0, 2),
        (1, "b", 1, 2),
        (2, "a", 0, 1),
    ]
    assert {(p.world_size, p.master_address, p.master_port, p.restart) for p in places} == {(3, "10.0.0.2", 99, 1)}


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_ranks_meet(tmp_path, num_ranks):
    acts = [{"rank": rank, "act": "add"} for rank in range(num_ranks)]
    assert run(make_config(tmp_path, sp_degree=num_ranks, acts=acts)) == REPORT
    seen = read_seen(tmp_path)
    assert [(each["global_rank"], each["rank"]) for each in seen] == [(rank, str(rank)) for rank in range(num_ranks)]
    assert len({each["pid"] for each in seen}) == num_ranks
    assert not any(each["torch"] for each in seen)  # loaded after the environment is set
    sums = {json.loads((tmp_path / f"sum-{rank}.json").read_text()) for rank in range(num_ranks)}
    assert sums == {sum(range(num_ranks))}


@pytest.mark.parametrize(("act", "rank"), [("kill", 0), ("leave", 1), ("fail", 1)])
def test_a_lost_rank_starts_all_again(tmp_path, caplog, act, rank):
    acts = [{"rank": rank, "act": act}, {"rank": 1 - rank, "act": "hang"}, {"rank": rank, "restart": 1, "act": act}]
    config = make_config(tmp_path, sp_degree=2, acts=acts, max_restarts=2)
    assert run(config)["restart"] == 2
    assert not {seen["pid"] for seen in read_seen(tmp_path, 1)} & {seen["pid"] for seen in read_seen(tmp_path, 2)}
    assert not is_running(json.loads((tmp_path / f"child-{1 - rank}.json").read_text()))
    assert f"rank {rank}" in caplog.text
    assert "from the last checkpoint (2 of 2)" in caplog.text
    if act == "leave":
        assert "exit code 7" in caplog.text
        assert "the last words" in caplog.text


def test_lost_too_often(tmp_path):
    acts = [{"rank": 1, "act": "kill", "restart": restart} for restart in range(3)]
    with pytest.raises(LongctxError, match=r"after 1 restarts \(cluster.max_restarts\): rank 1 was killed by SIGKILL"):
        run(make_config(tmp_path, sp_degree=2, acts=acts, max_restarts=1))
    assert len(list(tmp_path.glob("seen-2-*"))) == 0


@pytest.mark.parametrize(("act", "kind"), [("refuse", CheckpointError), ("diverge", NotFiniteError)])
def test_what_would_come_again_is_not_tried_again(tmp_path, act, kind):
    """Also if the other rank, which the first one left alone, fails before."""
    acts = [{"rank": 0, "act": "fail"}, {"rank": 1, "act": act}]
    with pytest.raises(kind):
        run(make_config(tmp_path, sp_degree=2, acts=acts))
    assert read_seen(tmp_path, 1) == []


def test_what_the_ends_of_ranks_mean():
    good, failed = RankOutcome(report={"loss": 1.0}), RankOutcome(failure="Traceback: peer gone")
    assert settle({0: good, 1: good}, {}) == {"loss": 1.0}
    with pytest.raises(ConfigError, match="bad key"):
        settle({1: RankOutcome(error=ConfigError("bad key")), 0: failed}, {2: "was killed"})
    with pytest.raises(WorkerLostError, match="rank 1 was killed"):
        settle({0: failed}, {1: "was killed"})  # the cause, not what the other made of it
    with pytest.raises(WorkerLostError, match="rank 0 failed: Traceback: peer gone"):
        settle({0: failed, 1: good}, {})


def test_after_a_request_to_stop_nothing_is_started_again():
    attempts = []

    def attempt(restart):
        attempts.append(restart)
        raise WorkerLostError("rank 1 was lost")

    stop = threading.Event()
    stop.set()
    with pytest.raises(WorkerLostError):
        supervise(attempt, max_restarts=3, stop=stop)
    assert attempts == [0]


def test_orders_and_outcomes_cross_processes():
    for outcome in (RankOutcome(report={"loss": 0.5}), RankOutcome(error=ConfigError("no")), RankOutcome(failure="x")):
        again = pickle.loads(pickle.dumps(outcome))
        assert (again.report, str(again.error), again.failure) == (outcome.report, str(outcome.error), outcome.failure)


def test_logs(tmp_path):
    """Rank 0's are the command's; of the others' what is a warning at least."""
    process = start_command(tmp_path, acts=[{"rank": rank, "act": "log"} for rank in range(2)])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    texts = sorted(line.partition(" ")[2].partition(" ")[2] for line in output.splitlines())
    assert texts == ["INFO trainer: a step", "WARNING rank 1 trainer: a warning", "WARNING trainer: a warning"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_ranks_save(tmp_path, number):
    process = start_command(tmp_path, acts=[{"rank": rank, "act": "wait"} for rank in range(2)])
    pids = wait_for_ranks(tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert f"stopped; the same command goes on from {tmp_path}" in output
    assert [json.loads((tmp_path / f"stopped-{rank}.json").read_text()) for rank in range(2)] == [True, True]
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_second_signal_or_kill_leaves_nothing(tmp_path, number):
    process = start_command(tmp_path, acts=[{"rank": rank, "act": "hang"} for rank in range(2)])
    pids = wait_for_ranks(tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("child-*.json"))) == 2)
    pids += [json.loads((tmp_path / f"child-{rank}.json").read_text()) for rank in range(2)]
    process.send_signal(number)
    if number == signal.SIGTERM:
        time.sleep(1.0)
        assert all(psutil.pid_exists(pid) for pid in pids)  # a first one asks
        process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGTERM else -number), output
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def test_a_folder_is_trained_into_once(tmp_path):
    first = start_command(tmp_path, acts=[{"rank": rank, "act": "wait"} for rank in range(2)])
    wait_for_ranks(tmp_path)
    second = start_command(tmp_path, acts=[{"rank": rank, "act": "wait"} for rank in range(2)])
    output, _ = second.communicate(timeout=30)
    assert second.returncode == 2
    assert f"output={tmp_path} is not allowed: process {first.pid} on" in output
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=30)
    third = start_command(tmp_path, acts=[])
    output, _ = third.communicate(timeout=30)
    assert third.returncode == 0, output


def test_sweep(tmp_path):
    """One failing run does not keep the others from running; the table has all of them."""
    for index in range(3):
        make_config(tmp_path / f"sweep-{index}", acts=[{"rank": 0, "act": "refuse"}] if index == 1 else [])
    words = [*COMMAND, "-m", f"output={tmp_path}", "optimizer.lr=1e-4,2e-4,3e-4", "train.num_steps=7"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["optimizer.lr", "rank", "restart", "loss", "stopped", "output"]
    assert lines[1] == ["0.0001", "0", "0", "0.5", "False", str(tmp_path / "sweep-0")]
    assert lines[2][:6] == ["0.0002", "-", "-", "-", "-", str(tmp_path / "sweep-1")]
    assert "no weights" in done.stdout.splitlines()[2]
    assert lines[3] == ["0.0003", "0", "0", "0.5", "False", str(tmp_path / "sweep-2")]


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
