"""``longctx submit`` and ``longctx job``: a longctx command line as a job of a Ray cluster, over Ray's Jobs API.

The job's process is the same command on the cluster's head node, which joins the cluster there. A cluster with token
authentication takes RAY_AUTH_MODE=token and its token in the environment, as every connection to it does.
"""

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import JobConfig, JobListConfig, JobLogsConfig, SubmitCommandConfig, SubmitConfig
from cluster.ray_address import TOKEN_HINT
from longctx.cli.command_line import parse
from longctx.cli.sweep import Run, expand_sweep
from longctx.config import compose, list_keys
from longctx.errors import ConfigError, LongctxError
from parallel.registry import load

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ADDRESS_KEYS = ("cluster.address", "ray.address")  # of the Ray that a command joins
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
POLL_S = 0.5


def submit(config: SubmitCommandConfig, words: list[str]) -> int:
    """Submit the command line ``words``; returns the exit code, the job's own kind of end if it is followed."""
    options = config.submit
    entrypoint = shlex.join([options.python, "-m", "longctx.cli.main", *complete(words)])
    runtime_env = describe_environment(options)
    with connect(options.address, "submit.address") as client:
        job_id = client.submit_job(entrypoint=entrypoint, submission_id=options.id, runtime_env=runtime_env)
        address = f" address={options.address}" if options.address else ""
        sys.stderr.write(f"submitted {job_id}; longctx job stop id={job_id}{address} stops it\n")
        return _follow(client, job_id) if options.follow else 0


def show_status(config: JobConfig) -> int:
    """Print one job's state."""
    with connect(config.address) as client:
        sys.stdout.write("\n".join(f"{name}: {text}" for name, text in _describe(_find(client, config.id))) + "\n")
    return 0


def show_logs(config: JobLogsConfig) -> int:
    """Print what a job printed, and follow it; returns 1 if it did not succeed."""
    with connect(config.address) as client:
        job_id = _id_of(_find(client, config.id))
        if config.follow:
            return _follow(client, job_id)
        sys.stdout.write(client.get_job_logs(job_id))
    return 0


def stop(config: JobConfig) -> int:
    """Ask a job to end and wait for it: a training saves its state first."""
    with connect(config.address) as client:
        job_id = _id_of(_find(client, config.id))
        was_running = client.stop_job(job_id)
        while not (status := client.get_job_status(job_id)).is_terminal():
            time.sleep(POLL_S)
    sys.stdout.write(f"{job_id}: {status}\n" if was_running else f"{job_id} had ended: {status}\n")
    return 0


def list_jobs(config: JobListConfig) -> int:
    """Print all jobs that were submitted, the newest first."""
    with connect(config.address) as client:
        jobs = [job for job in client.list_jobs() if job.submission_id]
    rows = [("id", "status", "started", "command")]
    for job in sorted(jobs, key=lambda job: job.start_time or 0, reverse=True):
        fields = dict(_describe(job))
        rows.append((fields["id"], fields["status"], fields["started"], fields["command"]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for *cells, command in rows:
        text = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        sys.stdout.write(f"{text}  {command}\n")
    return 0


def complete(words: list[str]) -> list[str]:
    """The command line as the job runs it, which joins the cluster that the job is on.

    Raises ``ConfigError`` for a mistake in it, before anything is sent.
    """
    if not words:
        raise ConfigError("a command is missing: longctx submit train key=value ...")
    line = parse(words)
    if line.command.is_carrier:
        raise ConfigError(f"{line.command.name} cannot be submitted")
    root = load(line.command.root)
    runs = expand_sweep(line.overrides) if line.sweeps else [Run((), line.overrides)]
    for run in runs:
        config = compose(root, line.command.config_name, run.overrides, config_dir=line.config_dir)
        output = getattr(config, "output", None)
        if output is not None and not Path(output).is_absolute():
            raise ConfigError(
                f"output={output} is not allowed in a job, whose folder goes with it: "
                "give an absolute path that all nodes see"
            )
    given = {word.lstrip("+").partition("=")[0] for word in line.overrides}
    addresses = [f"{key}=auto" for key in ADDRESS_KEYS if key in list_keys(root) and key not in given]
    return [*words, *addresses]


def describe_environment(options: SubmitConfig) -> dict[str, Any]:
    """Ray's runtime environment of a job."""
    own = {"RAY_JOB_STOP_WAIT_TIME_S": str(options.stop_timeout_s), "PYTHONUNBUFFERED": "1"}
    environment: dict[str, Any] = {"env_vars": own | options.env_vars}
    if options.working_dir is not None:
        if not Path(options.working_dir).is_dir():
            raise ConfigError(f"submit.working_dir={options.working_dir} is not allowed: there is no such folder")
        environment["working_dir"] = os.path.abspath(options.working_dir)
        environment["excludes"] = list(options.exclude)
    if options.pip:
        environment["pip"] = list(options.pip)
    return environment


@contextmanager
def connect(address: str | None, key: str = "address") -> Iterator["JobSubmissionClient"]:
    """A client of the job server at ``address``; its errors, and a server that is not there, as the project's own."""
    if address is not None:
        for name in ADDRESS_VARIABLES:  # what was typed counts
            os.environ.pop(name, None)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient
    from requests import RequestException

    told = f"{key}={address}" if address else f"{key}=null"
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError:
        raise ConfigError(f"{told} cannot be used: it refuses this token, or its lack; {TOKEN_HINT}") from None
    except (ConnectionError, RuntimeError, ValueError, RequestException) as error:
        raise ConfigError(
            f"{told} cannot be used: no job server of Ray answers there ({_first_line(error)}); "
            "http://HOST:8265 is expected, and a head node whose dashboard runs"
        ) from None
    try:
        yield client
    except (ConnectionError, RuntimeError, RequestException) as error:
        raise LongctxError(f"the job server of Ray says: {error}") from None


def _follow(client: "JobSubmissionClient", job_id: str) -> int:
    """Print what the job prints until it ends."""

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            sys.stdout.write(text)
            sys.stdout.flush()

    try:
        asyncio.run(tail())
        while not (job := client.get_job_info(job_id)).status.is_terminal():
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        sys.stderr.write(f"{job_id} goes on; longctx job logs id={job_id} follows it again\n")
        raise
    if job.status != "SUCCEEDED":
        raise LongctxError(f"{job_id} {job.status.lower()}: {_first_line(job.message)}")
    return 0


def _find(client: "JobSubmissionClient", job_id: str | None) -> "JobDetails":
    known = {_id_of(job): job for job in client.list_jobs() if job.submission_id}
    if job_id not in known:
        there = ", ".join(known) or "there is none"
        raise ConfigError(f"id={job_id or 'null'} is no job of this cluster; its jobs: {there}")
    return known[job_id]


def _id_of(job: "JobDetails") -> str:
    assert job.submission_id is not None
    return job.submission_id


def _describe(job: "JobDetails") -> list[tuple[str, str]]:
    def show_time(milliseconds: int | None) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000)) if milliseconds else "-"

    return [
        ("id", _id_of(job)),
        ("status", str(job.status)),
        ("started", show_time(job.start_time)),
        ("ended", show_time(job.end_time)),
        ("command", job.entrypoint),
        ("message", _first_line(job.message)),
    ]


def _first_line(message: object) -> str:
    return next(iter(str(message or "").splitlines()), "")
