"""What ``fault_peers.py`` disturbs, one prefill and one decode worker each: what all have in common, and longctx.

longctx starts anew by itself what ended; a process that is frozen and stays so is ended by the benchmark.
"""

import argparse
import http.client
import json
import os
import random
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

from benchmarks.peers import HOST, SERVED_NAME
from tests.cli_server import SMALL, CliServer, wait_until

CLIENT_S = 60.0  # a client waits no longer for the next thing to arrive
HIT_AFTER = 10  # events of an answer that is disturbed in its middle
SHORT = 600  # characters of a prompt, a token each
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
            so_far = "right" if expected.startswith(self.text) else "wrong"
            return f"{self.end} after {len(self.text)} {so_far} characters"
        return f"{self.end} {self.detail[:4].strip()}" if self.detail[:3].isdigit() else self.end


class System(ABC):
    """One prefill and one decode worker."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
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


def text_of(answer: Answer) -> str:
    """Of an answer that came as a whole."""
    assert answer.end == "done", answer
    return answer.text


class Longctx(System):
    """``longctx serve``."""

    def __init__(self, server: CliServer, settings: list[str]) -> None:
        super().__init__([*SMALL, *settings])
        self.server = server
        self.heal()

    def expect(self, prompt: str, max_tokens: int = 24) -> str:
        return text_of(self.ask(prompt, max_tokens, cache_salt="undisturbed"))

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
        """A worker that is lost is killed in the end, frozen or not, and started anew."""
        time.sleep(2.0)  # until it is noticed
        wait_until(self._is_whole, 240.0, self.server.output)
        return "itself"

    def _is_whole(self) -> bool:
        with suppress(httpx.HTTPError):
            return all(each["alive"] for each in self.server.status()["workers"])
        return False

    def _is_between(self) -> bool:
        """The prompt is being computed, and decode has pages for it."""
        prefill, decode = (self.server.worker(f"{role}-0")["engine"] for role in ("prefill", "decode"))
        return prefill["num_running"] > 0 and decode["num_pages_used"] > 0
