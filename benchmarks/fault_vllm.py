"""vLLM's CPU build with NIXL as ``fault_peers.py`` disturbs it: a prefill and a decode server.

vLLM has no endpoint of its own for the two: the client does what vLLM's example proxy does (one token from the prefill
server, then the decode server with the handle that the first one gave), and starts what a fault left unusable anew.
"""

import json
import logging
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.fault_systems import CLIENT_S, NO_HANDLE, SHORT, Answer, System, stream, text_of
from benchmarks.machine import REPOSITORY
from benchmarks.peers import HOST, POLL_S, SERVED_NAME
from benchmarks.processes import ProcessTree
from tests.cli_server import free_port, wait_until

logger = logging.getLogger(__name__)

TRIES = 3  # of replayed and forged handles
MODEL = REPOSITORY / "longctx" / "models" / "demo"
ENV = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "UCX_TLS": "tcp",
}


class Vllm(System):
    """Two vLLM servers, and a client that is their proxy, too."""

    def __init__(self, python: str, folder: Path, policy: str) -> None:
        version = [python, "-c", "import vllm, importlib.metadata as m; print(vllm.__version__, m.version('nixl'))"]
        found = subprocess.run(version, capture_output=True, text=True, timeout=120, check=True, cwd=folder)
        transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
        command = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "16384", "--kv-transfer-config"]
        command.append(json.dumps(transfer | {"kv_load_failure_policy": policy}))
        super().__init__({"vllm, nixl": found.stdout.split()[-2:], "arguments": command, "env": ENV})
        self._python, self._folder = python, folder
        self._ports = {role: (free_port(), free_port()) for role in ("prefill", "decode")}
        self._trees: dict[str, ProcessTree] = {}
        self._usable: set[str] = set()

    def expect(self, prompt: str, max_tokens: int = 24) -> str:
        """Of the prefill server alone: nothing travels."""
        url = self._url("prefill")
        return text_of(stream(url, prompt=prompt, max_tokens=max_tokens, cache_salt="undisturbed"))

    def ask(self, prompt: str, max_tokens: int = 24, *, act: Callable[[], bool] | None = None, **more: Any) -> Answer:
        handle = self.prefill(prompt, **more)
        return handle if isinstance(handle, Answer) else self.decode(prompt, handle, max_tokens, act=act, **more)

    def prefill(
        self, prompt: str, *, timeout_s: float = CLIENT_S, cache_salt: str = "bench"
    ) -> dict[str, Any] | Answer:
        """The first step: a handle, or how it ended."""
        body = {"model": SERVED_NAME, "prompt": prompt, "max_tokens": 1, "temperature": 0, "cache_salt": cache_salt}
        url = f"{self._url('prefill')}/v1/completions"
        try:
            response = httpx.post(url, json=body | {"kv_transfer_params": NO_HANDLE}, timeout=timeout_s)
        except httpx.TimeoutException:
            return Answer("timeout", detail="prefill")
        except httpx.HTTPError as error:
            return Answer("error", detail=f"prefill: {type(error).__name__}")
        if response.status_code != 200:
            return Answer("error", detail=f"prefill: {response.status_code} {response.text[:300]}")
        return response.json()["kv_transfer_params"]

    def decode(self, prompt: str, handle: dict[str, Any], max_tokens: int = 24, **more: Any) -> Answer:
        """The second step."""
        return stream(self._url("decode"), prompt=prompt, max_tokens=max_tokens, kv_transfer_params=handle, **more)

    def hit_between(self, prompt: str, number: signal.Signals) -> tuple[Answer, float]:
        handle = self.prefill(prompt)
        assert isinstance(handle, dict), handle
        self.signal("prefill", number)
        begun = time.monotonic()
        return self.decode(prompt, handle), time.monotonic() - begun

    def signal(self, role: str, number: signal.Signals) -> None:
        root = psutil.Process(self._trees[role].process.pid)
        for each in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(number)
        self._usable.discard(role)

    def count_held(self) -> float:
        """The gauge is set by steps, so that a request of one token goes first."""
        held = 0.0
        for role in self._usable:
            body = {"model": SERVED_NAME, "prompt": "x", "max_tokens": 1}
            httpx.post(f"{self._url(role)}/v1/completions", json=body, timeout=5)
            metrics = httpx.get(f"{self._url(role)}/metrics", timeout=5).text
            held += sum(float(each) for each in re.findall(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", metrics, re.M))
        return held

    def leave_between(self, prompt: str) -> None:
        assert isinstance(self.prefill(prompt), dict)

    def misuse(self, what: str) -> dict[str, Any]:
        outcomes, owners, rightly = [], [], []
        own = self.prefill(self.draw(SHORT)) if what == "forged" else {}
        for _ in range(TRIES):
            owner, other = self.draw(SHORT), self.draw(SHORT)
            expected_of_owner, expected = self.expect(owner), self.expect(other)
            handle = self.prefill(owner)
            assert isinstance(handle, dict) and isinstance(own, dict)
            if what == "replayed":
                owners.append(self.decode(owner, handle).judge(expected_of_owner))
                answer = self.decode(other, handle)
            else:
                answer = self.decode(
                    other, own | {name: handle[name] for name in ("remote_request_id", "remote_block_ids")}
                )
                owners.append(self.decode(owner, handle).judge(expected_of_owner))
            is_leak = answer.text == expected_of_owner != expected
            outcomes.append("the owner's answer" if is_leak else answer.judge(expected))
            rightly.append(self.ask(other).judge(expected))
            logger.info("%s: %s, the owner: %s, asked rightly: %s", what, outcomes[-1], owners[-1], rightly[-1])
        return {"outcomes": outcomes, "owners": owners, "asked_rightly": rightly}

    def heal(self) -> str:
        """Start anew what a fault hit."""
        hit = [role for role in self._ports if role not in self._usable]
        for role in hit:
            self._end(role)
            self._trees[role] = self._start(role)
        for role in hit:
            wait_until(lambda role=role: self._is_ready(role), 240.0, self._trees[role].log_tail)
        self._usable |= set(hit)
        return f"starting {', '.join(hit)} anew"

    def stop(self) -> None:
        for role in self._ports:
            self._end(role)

    def _start(self, role: str) -> ProcessTree:
        port, side_port = self._ports[role]
        command = [
            self._python,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(MODEL),
            "--served-model-name",
            SERVED_NAME,
        ]
        command += ["--host", HOST, "--port", str(port), *self.settings["arguments"]]
        env = ENV | {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port)}
        return ProcessTree(command, self._folder / f"{role}.log", env=env, cwd=self._folder)

    def _end(self, role: str) -> None:
        if (tree := self._trees.pop(role, None)) is not None:
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(tree.process.pid)
                for each in [*root.children(recursive=True), root]:
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
            tree.stop()

    def _is_ready(self, role: str) -> bool:
        self._trees[role].check_alive()
        time.sleep(POLL_S)
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self._url(role)}/health", timeout=5).status_code == 200
        return False

    def _url(self, role: str) -> str:
        return f"http://{HOST}:{self._ports[role][0]}"
