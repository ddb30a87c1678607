"""What ``fault_peers.py`` disturbs: longctx and vLLM's CPU build with NIXL, one prefill and one decode worker each.

vLLM has no endpoint of its own for two servers: the client does what vLLM's example proxy does (one token from the
prefill server, then the decode server with the handle that the first one gave), and starts what a fault left unusable
anew. longctx starts what ended by itself; a process that is frozen and stays so is ended by the benchmark.
"""

import argparse
import http.client
import json
import logging
import os
import random
import re
import signal
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.machine import REPOSITORY
from benchmarks.peers import HOST, POLL_S, SERVED_NAME
from benchmarks.processes import ProcessTree
from tests.cli_server import CliServer, free_port, wait_until

logger = logging.getLogger(__name__)

CLIENT_S = 60.0  # a client waits no longer for the next thing to arrive
HIT_AFTER = 10  # events of an answer that is disturbed in its middle
TRIES = 3  # of replayed and forged handles
SHORT = 600  # characters of a prompt, a token each
MODEL = REPOSITORY / "longctx" / "models" / "demo"
DOCUMENT = "".join(Path(module.__file__ or "").read_text() for module in (argparse, random, statistics))
NO_HANDLE = {"do_remote_decode": True, "do_remote_prefill": False} | dict.fromkeys(
    ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got."""

    end: str  # done, left, timeout or error
    text: str = ""
    detail: str = ""

    def judge(self, expected: str) -> str:
        """In a word or two."""
        if self.end == "done":
            return "right" if self.text == expected else "wrong text"
        if self.text:
            return (
                f"{self.end} after {len(self.text)} {'right' if expected.startswith(self.text) else 'wrong'} characters"
            )
        return f"{self.end} {self.detail[:4].strip()}" if self.detail[:3].isdigit() else self.end


class System(ABC):
    """One prefill and one decode worker."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def draw(self, length: int) -> str:
        """A prompt that nobody has asked."""
        start = self._random.randrange(len(DOCUMENT) - length)
        return DOCUMENT[start : start + length]

    @abstractmethod
    def expect(self, prompt: str, max_tokens: int = 24) -> str:
        """The right answer: an undisturbed one, of which nothing comes into the prefix cache that is used later."""

    @abstractmethod
    def ask(self, prompt: str, max_tokens: int = 24, *, act: Callable[[], bool] | None = None, **more: Any) -> Answer:
        """One request; see ``stream`` for ``act``."""

    @abstractmethod
    def hit_between(self, prompt: str, number: signal.Signals) -> tuple[Answer, float]:
        """Send a signal to prefill before decode has everything; the answer, and its seconds from then."""

    @abstractmethod
    def signal(self, role: str, number: signal.Signals) -> None:
        """Send a signal to a worker."""

    @abstractmethod
    def count_held(self) -> float:
        """What is held of the pages of workers that live."""

    @abstractmethod
    def leave_between(self, prompt: str) -> None:
        """A client that is gone before decode has everything."""

    @abstractmethod
    def misuse(self, what: str) -> dict[str, Any]:
        """Use a handle again (``replayed``), or another's (``forged``)."""

    @abstractmethod
    def heal(self) -> str:
        """Return once both workers are there; says by what."""


def stream(url: str, *, act: Callable[[], bool] | None = None, timeout_s: float = CLIENT_S, **body: Any) -> Answer:
    """A streamed completion; after some events ``act`` is called, and if it returns True, the client leaves."""
    text, num_events, deadline = "", 0, None
    body = {"model": SERVED_NAME, "temperature": 0, "stream": True, "ignore_eos": True, "cache_salt": "bench"} | body
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=timeout_s) as response:
            if response.status_code != 200:
                return Answer("error", detail=f"{response.status_code} {response.read().decode()[:300]}")
            for line in response.iter_lines():
                if deadline is not None and time.monotonic() > deadline:
                    return Answer("timeout", text)
                if line == "data: [DONE]":
                    return Answer("done", text)
                if not line.startswith("data: "):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event or event["choices"][0].get("finish_reason") in ("error", "abort"):
                    return Answer("error", text, line[:300])
                text += event["choices"][0]["text"]
                num_events += 1
                if act is not None and num_events == HIT_AFTER:
                    deadline = time.monotonic() + timeout_s
                    if act():
                        return Answer("left", text)
    except httpx.TimeoutException:
        return Answer("timeout", text)
    except httpx.HTTPError as error:
        return Answer("error", text, f"{type(error).__name__}: {error}")
    return Answer("error", text, "ended without [DONE]")


def _text(answer: Answer) -> str:
    assert answer.end == "done", answer
    return answer.text


class Longctx(System):
    """``longctx serve``."""

    def __init__(self, server: CliServer) -> None:
        super().__init__()
        self.server = server
        self._frozen: int | None = None  # a process that nobody has ended yet
        self.heal()

    def expect(self, prompt: str, max_tokens: int = 24) -> str:
        return _text(self.ask(prompt, max_tokens, cache_salt="undisturbed"))

    def ask(self, prompt: str, max_tokens: int = 24, *, act: Callable[[], bool] | None = None, **more: Any) -> Answer:
        return stream(self.server.url, act=act, prompt=prompt, max_tokens=max_tokens, **more)

    def hit_between(self, prompt: str, number: signal.Signals) -> tuple[Answer, float]:
        answers: list[Answer] = []
        thread = threading.Thread(target=lambda: answers.append(self.ask(prompt)))
        thread.start()
        wait_until(self._is_between, CLIENT_S)
        assert not answers, "it was answered before it could be disturbed"
        self.signal("prefill", number)
        begun = time.monotonic()
        thread.join()
        return answers[0], time.monotonic() - begun

    def signal(self, role: str, number: signal.Signals) -> None:
        pid = self.server.worker(f"{role}-0")["pid"]
        self._frozen = pid if number == signal.SIGSTOP else None
        os.kill(pid, number)

    def count_held(self) -> float:
        status = self.server.status()
        held = sum(each["engine"]["num_pages_used"] for each in status["workers"] if each["alive"])
        return held + status["requests_in_progress"]

    def leave_between(self, prompt: str) -> None:
        connection = http.client.HTTPConnection(HOST, self.server.port)
        body = {"model": SERVED_NAME, "prompt": prompt, "max_tokens": 24, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        wait_until(self._is_between, CLIENT_S)
        connection.close()

    def misuse(self, what: str) -> dict[str, Any]:
        prompt = self.draw(SHORT)
        handle = NO_HANDLE | {"do_remote_decode": False, "do_remote_prefill": True, "remote_block_ids": [[1, 2, 3, 4]]}
        answer = self.ask(prompt, kv_transfer_params=handle)
        outcome = answer.judge(self.expect(prompt))
        return {
            "outcomes": [outcome],
            "detail": answer.detail,
            "asked_rightly": self.ask(prompt).judge(self.expect(prompt)),
        }

    def heal(self) -> str:
        if self._frozen is not None:
            os.kill(self._frozen, signal.SIGKILL)
        frozen, self._frozen = self._frozen, None
        time.sleep(2.0)  # until it is noticed
        wait_until(self._is_whole, 240.0, self.server.output)
        return "itself" if frozen is None else "ending the frozen worker; then itself"

    def _is_whole(self) -> bool:
        with suppress(httpx.HTTPError):
            return all(each["alive"] for each in self.server.status()["workers"])
        return False

    def _is_between(self) -> bool:
        """The prompt is being computed, and decode has pages for it."""
        prefill, decode = (self.server.worker(f"{role}-0")["engine"] for role in ("prefill", "decode"))
        return prefill["num_running"] > 0 and decode["num_pages_used"] > 0


class Vllm(System):
    """Two vLLM servers, and a client that is their proxy, too."""

    def __init__(self, python: str, folder: Path, policy: str | None = None) -> None:
        super().__init__()
        self._python, self._folder, self._policy = python, folder, policy
        self._ports = {role: (free_port(), free_port()) for role in ("prefill", "decode")}
        self._trees: dict[str, ProcessTree] = {}
        self._usable: set[str] = set()
        self.heal()

    def expect(self, prompt: str, max_tokens: int = 24) -> str:
        """Of the prefill server alone: nothing travels."""
        url = self._url("prefill")
        return _text(stream(url, prompt=prompt, max_tokens=max_tokens, cache_salt="undisturbed"))

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
        transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
        if self._policy:
            transfer["kv_load_failure_policy"] = self._policy
        command = [self._python, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL)]
        command += ["--served-model-name", SERVED_NAME, "--host", HOST, "--port", str(port), "--enforce-eager"]
        command += ["--dtype", "float32", "--max-model-len", "16384", "--kv-transfer-config", json.dumps(transfer)]
        env = {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "UCX_TLS": "tcp",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port),
        }
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
