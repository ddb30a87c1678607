"""The engines that benchmarks compare, each running in processes of its own on all cores.

Servers are loaded over HTTP, the others through pipes (``offline.py``). A new engine is one function and one line in
``ENGINES``.
"""

import asyncio
import json
import os
import select
import shlex
import socket
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import REPOSITORY, count_cores
from benchmarks.processes import ProcessTree
from benchmarks.timings import RequestTiming, check_timing

VLLM_PYTHON = "LONGCTX_BENCH_VLLM_PYTHON"
HOST = "127.0.0.1"
SERVED_NAME = "bench"
POLL_S = 0.5
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past any proxy that the environment names
TRANSFORMERS_MAX_WAVE = 65536  # prompt tokens in a batch; activations of more do not fit a small machine


class SkippedError(Exception):
    """An engine cannot run here, and that is no fault; the text says why."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What every engine is started with."""

    checkpoint: Path
    logs: Path  # folder
    max_context: int  # tokens of prompt and output together that must fit
    kv_gib: int  # KV budget of each worker
    device: str = "auto"
    extra: Mapping[str, str] = field(default_factory=dict)  # more arguments, by the engine's name


class Engine(ABC):
    """A running engine."""

    max_wave_tokens: int | None = None  # prompt tokens it takes in one wave

    def __init__(self, name: str, tree: ProcessTree, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.name = name
        self.tree = tree
        self.settings: dict[str, Any] = {"command": shlex.join(command), "env": dict(env)}
        self.device_bytes = 0  # peak of GPU memory, where the engine tells

    @abstractmethod
    def wait_ready(self, deadline_s: float) -> None:
        """Return once it takes requests.

        Args:
            deadline_s: by ``time.monotonic``.

        Raises:
            RuntimeError: it ended; the text has the end of its log.
            TimeoutError: the deadline passed.
        """

    @abstractmethod
    def run_wave(
        self, prompts: Sequence[Sequence[int]], *, num_output_tokens: int, timeout_s: float
    ) -> list[RequestTiming]:
        """Continue all prompts, sent at one time; raises ``RuntimeError`` or ``TimeoutError``."""


class HttpEngine(Engine):
    """An OpenAI-compatible server on ``port``."""

    def __init__(
        self, name: str, tree: ProcessTree, command: Sequence[str], env: Mapping[str, str], *, port: int
    ) -> None:
        super().__init__(name, tree, command, env)
        self.url = f"http://{HOST}:{port}"

    def wait_ready(self, deadline_s: float) -> None:
        """Until ``/health`` answers 200."""
        while not self._is_ready():
            self.tree.check_alive()
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{self.name} is not ready in time: {self.tree.log_tail()}")
            time.sleep(POLL_S)

    def run_wave(
        self, prompts: Sequence[Sequence[int]], *, num_output_tokens: int, timeout_s: float
    ) -> list[RequestTiming]:
        """One streamed completion per prompt."""
        from benchmarks.load import send_wave  # needs aiohttp, which machines without servers may lack

        return asyncio.run(
            send_wave(self.url, SERVED_NAME, prompts, num_output_tokens=num_output_tokens, timeout_s=timeout_s)
        )

    def _is_ready(self) -> bool:
        try:
            with DIRECT.open(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False


class PipedEngine(Engine):
    """A ``benchmarks.offline`` process."""

    def wait_ready(self, deadline_s: float) -> None:
        """Until its first line."""
        self.settings |= self._read(deadline_s)["settings"]

    def run_wave(
        self, prompts: Sequence[Sequence[int]], *, num_output_tokens: int, timeout_s: float
    ) -> list[RequestTiming]:
        """One order, one answer."""
        stdin = self.tree.process.stdin
        assert stdin is not None
        order = json.dumps({"prompts": prompts, "num_output_tokens": num_output_tokens})
        try:
            stdin.write(order + "\n")
        except BrokenPipeError:
            self.tree.check_alive()
            raise RuntimeError(f"{self.name} has closed its input") from None
        answer = self._read(time.monotonic() + timeout_s)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        self.device_bytes = answer["device_bytes"]
        timings = [
            RequestTiming(sent_s, tuple(event_s), num_prompt_tokens=len(prompt), num_output_tokens=count)
            for prompt, (sent_s, event_s, count) in zip(prompts, answer["timings"], strict=True)
        ]
        for timing in timings:
            check_timing(timing, num_output_tokens)
        return timings

    def _read(self, deadline_s: float) -> dict[str, Any]:
        """The next line; the pipe holds at most one, so waiting for the descriptor is enough."""
        stdout = self.tree.process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
            raise TimeoutError(f"{self.name} did not answer in time: {self.tree.log_tail()}")
        line = stdout.readline()
        if not line:
            self.tree.process.wait(timeout=10)
            self.tree.check_alive()
        return json.loads(line)


def start_longctx(launch: Launch, name: str) -> Engine:
    """``longctx serve``: prefill and decode in two processes."""
    return _serve_longctx(launch, name, [])


def start_colocated(launch: Launch, name: str) -> Engine:
    """``longctx serve`` with one process for both."""
    return _serve_longctx(launch, name, ["cluster=colocated"])


def start_vllm(launch: Launch, name: str) -> Engine:
    """vLLM's CPU build, in the venv that an environment variable names."""
    python = os.environ.get(VLLM_PYTHON)
    if not python:
        raise SkippedError(f"{VLLM_PYTHON} is not set; benchmarks/README.md says how to install vLLM")
    if launch.device == "cuda":
        raise SkippedError("only vLLM's CPU build is compared")
    port = _free_port()
    arguments = {
        "--served-model-name": SERVED_NAME,
        "--host": HOST,
        "--port": str(port),
        "--dtype": "bfloat16",
        "--max-model-len": str(launch.max_context),
    }
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(launch.checkpoint)]
    command += [part for pair in arguments.items() for part in pair] + _extra(launch, name)
    env = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": str(launch.kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{count_cores() - 1}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    # Elsewhere than in the repository, whose folders would be on its import path.
    tree = ProcessTree(command, launch.logs / f"{name}.log", env=env, cwd=launch.logs)
    return HttpEngine(name, tree, command, env, port=port)


def start_longctx_engine(launch: Launch, name: str) -> Engine:
    """longctx's engine alone, without Ray and HTTP."""
    return _start_offline(launch, name, ["longctx-engine", "--kv-bytes", str(launch.kv_gib * 2**30)])


def start_transformers(launch: Launch, name: str) -> Engine:
    """transformers' generate."""
    engine = _start_offline(launch, name, ["transformers"])
    if launch.device != "cuda":
        engine.max_wave_tokens = TRANSFORMERS_MAX_WAVE
    return engine


ENGINES: dict[str, Callable[[Launch, str], Engine]] = {
    "longctx": start_longctx,
    "longctx-colocated": start_colocated,
    "longctx-engine": start_longctx_engine,
    "transformers": start_transformers,
    "vllm": start_vllm,
}


def _serve_longctx(launch: Launch, name: str, overrides: list[str]) -> Engine:
    port = _free_port()
    command = [sys.executable, "-m", "longctx.cli.main", "serve", *overrides]
    command += [f"model.path={launch.checkpoint}", f"model.name={SERVED_NAME}", f"model.device={launch.device}"]
    command += [f"server.host={HOST}", f"server.port={port}", f"engine.kv_bytes={launch.kv_gib}GiB"]
    command += _extra(launch, name)
    tree = ProcessTree(command, launch.logs / f"{name}.log", env={}, cwd=REPOSITORY)
    return HttpEngine(name, tree, command, {}, port=port)


def _start_offline(launch: Launch, name: str, arguments: list[str]) -> Engine:
    command = [sys.executable, "-m", "benchmarks.offline", *arguments, "--model", str(launch.checkpoint)]
    command += ["--device", launch.device, *_extra(launch, name)]
    tree = ProcessTree(command, launch.logs / f"{name}.log", env={}, cwd=REPOSITORY, piped=True)
    return PipedEngine(name, tree, command, {})


def _extra(launch: Launch, name: str) -> list[str]:
    return shlex.split(launch.extra.get(name, ""))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]
