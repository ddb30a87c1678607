"""``longctx submit`` and ``longctx job``: mistakes that are found here, and jobs of a real Ray with its job server."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import SubmitConfig
from cluster.jobs import complete, describe_environment
from longctx.errors import ConfigError
from tests.cli_server import LONGCTX, run_longctx, wait_until
from tests.longctx.gang_body import make_config, read_seen
from tests.ray_nodes import start_nodes

ROOT = Path(__file__).parent.parent.parent


def test_a_job_joins_the_cluster_it_is_on():
    assert complete(["train", "output=/data/run"]) == ["train", "output=/data/run", "cluster.address=auto"]
    words = ["train", "output=/data/run", "cluster.address=10.0.0.1:6379"]
    assert complete(words) == words
    assert complete(["plan", "links"])[-1] == "ray.address=auto"
    assert complete(["plan", "attention"]) == ["plan", "attention"]
    sweep = ["train", "-m", "output=/data/run", "optimizer.lr=1e-4,2e-4"]
    assert complete(sweep) == [*sweep, "cluster.address=auto"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "a command is missing"),
        (["trian"], "did you mean train"),
        (["train", "optimizer.l=1"], "did you mean optimizer.lr"),
        (["train", "output=runs/x"], "output=runs/x is not allowed in a job"),
        (["train", "-m", "optimizer.lr=1e-4,x", "output=/x"], "optimizer.lr='x' is not allowed"),
        (["submit", "train"], "submit cannot be submitted"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(words, reason):
    with pytest.raises(ConfigError, match=reason):
        complete(words)


def test_environment(tmp_path):
    options = SubmitConfig(working_dir=str(tmp_path), exclude=["*.bin"], pip=["x==1"], env_vars={"A": "1"})
    environment = describe_environment(options)
    assert environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600", "PYTHONUNBUFFERED": "1", "A": "1"}
    assert (environment["working_dir"], environment["excludes"]) == (str(tmp_path), ["*.bin"])
    assert environment["pip"] == ["x==1"]
    assert set(describe_environment(SubmitConfig())) == {"env_vars"}
    with pytest.raises(ConfigError, match=r"submit\.working_dir=/absent is not allowed"):
        describe_environment(SubmitConfig(working_dir="/absent"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with start_nodes(tmp_path_factory.mktemp("ray"), 2, has_jobs=True) as nodes:
        yield nodes


def words_for(cluster, folder):
    """A training as a job; the test's ranks run in place of the trainer's by what the job's Python is."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nshift 2\ncd {ROOT} && exec {sys.executable} -m tests.longctx.train_command "$@"\n')
    python.chmod(0o755)
    return [f"submit.address={cluster.job_address}", f"submit.python={python}", "train", f"output={folder}"]


@pytest.mark.slow
def test_a_job_runs_and_is_followed(tmp_path, cluster):
    make_config(tmp_path, acts=[{"rank": rank, "act": "log"} for rank in range(2)])
    words = ["submit", "submit.id=first", *words_for(cluster, tmp_path), "parallel.sp_degree=2"]
    done = run_longctx(*words, env=cluster.env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "submitted first" in done.stderr
    assert "INFO trainer: a step" in done.stdout
    assert len(read_seen(tmp_path)) == 2
    address = f"address={cluster.job_address}"
    status = run_longctx("job", "status", "id=first", address, env=cluster.env)
    assert "status: SUCCEEDED" in status.stdout, status.stderr
    listed = run_longctx("job", "list", address, env=cluster.env)
    assert "first" in listed.stdout
    assert "cluster.address=auto" in listed.stdout
    logs = run_longctx("job", "logs", "id=first", address, env=cluster.env)
    assert "INFO trainer: a step" in logs.stdout


@pytest.mark.slow
def test_a_job_that_fails_fails_the_command(tmp_path, cluster):
    make_config(tmp_path, acts=[{"rank": 0, "act": "refuse"}])
    done = run_longctx("submit", *words_for(cluster, tmp_path), env=cluster.env)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: /data/model: no weights" in done.stdout
    assert "failed" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_stopped_job_saves(tmp_path, cluster):
    """``job stop`` waits for it; so does Ctrl-C of who follows not."""
    make_config(tmp_path, acts=[{"rank": rank, "act": "wait"} for rank in range(2)])
    words = ["submit", "submit.id=stopped", *words_for(cluster, tmp_path), "parallel.sp_degree=2"]
    following = subprocess.Popen([*LONGCTX, *words], env=os.environ | cluster.env, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(read_seen(tmp_path)) == 2, 120)
    following.send_signal(signal.SIGINT)
    _, errors = following.communicate(timeout=30)
    assert following.returncode == 130
    assert "stopped goes on" in errors
    assert not list(tmp_path.glob("stopped-*"))
    done = run_longctx("job", "stop", "id=stopped", f"address={cluster.job_address}", env=cluster.env)
    assert done.stdout == "stopped: STOPPED\n", done.stderr
    assert [json.loads((tmp_path / f"stopped-{rank}.json").read_text()) for rank in range(2)] == [True, True]
    again = run_longctx("job", "stop", "id=stopped", f"address={cluster.job_address}", env=cluster.env)
    assert again.stdout == "stopped had ended: STOPPED\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "env", "reason"),
    [
        (("job", "status", "id=absent"), {}, "id=absent is no job of this cluster"),
        (("job", "status"), {}, "id=null is no job of this cluster"),
        (("job", "list"), {"RAY_AUTH_TOKEN": "f" * 64}, "it refuses this token, or its lack"),
        (("job", "list"), {"RAY_AUTH_MODE": "disabled"}, "it refuses this token, or its lack"),
    ],
)
def test_what_is_wrong_is_said(cluster, command, env, reason):
    done = run_longctx(*command, f"address={cluster.job_address}", env=cluster.env | env)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
