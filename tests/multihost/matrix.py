"""Faults of workers and of their hosts, on hosts of their own with a real Ray: what clients get, and when.

    python -m tests.multihost.matrix --save multihost

Four hosts (``hosts.py``): the endpoint's, and three with two prefill and two decode workers. In each cell streams run,
and at a drawn moment a worker is killed or frozen, or its host is cut off or muted; after some seconds the host comes
back. An answer must be the one that came before without a fault. ``tests.cluster.fault_matrix`` hits every point of
the protocol, without Ray and without a network.

Streams do not outlive the endpoint's process or Serve's proxy (``endpoint``, ``proxy``): there, who gets no whole
answer asks again until one comes, and the question is when. With ``--listens`` the endpoint listens itself, one stands
by, and there is no proxy.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.cli_server import wait_until
from tests.cluster.fault_matrix import is_good, report
from tests.multihost.hosts import Hosts, names_of, start_hosts

logger = logging.getLogger(__name__)

FAULTS = ("kill", "freeze", "cut", "mute")
ROLES = ("prefill", "decode")
FRONT = {"endpoint": "ray::ServeReplica:", "proxy": "ray::ProxyActor"}  # how their processes are called
DOWN_S = 6.0  # that a host stays away, or a worker frozen
NUM_STREAMS = 6
MAX_TOKENS = 60
ASK_TIMEOUT_S = 120.0
STANDBY_S = 12.0  # until who stands by has loaded everything
RETRY_S, RETRY_READ_S = 0.1, 5.0  # who asks again: so long after a failure, and after so long without a sign
OVERRIDES = (
    "cluster.num_prefill_workers=2",
    "cluster.num_decode_workers=2",
    "cluster.local_prefill_tokens=0",
    "cluster.policy=splitwise",
)
TEXT = (Path(__file__).parents[2] / "README.md").read_text()


def make_bodies(seed: int) -> list[dict[str, Any]]:
    """Requests, greedy and seeded, of 500 to 3,000 tokens; no two seeds share a prefix."""
    rng = random.Random(seed)
    return [
        {
            "model": "demo",
            "prompt": f"{seed}-{number} " + TEXT[(start := rng.randrange(4000)) : start + rng.randint(500, 3000)],
            "max_tokens": MAX_TOKENS,
            "temperature": number % 2,
            "seed": rng.randrange(1 << 30),
            "stream": True,
        }
        for number in range(NUM_STREAMS)
    ]


@dataclass
class Answer:
    """What came of one stream."""

    text: str = ""
    problem: str = "no [DONE]"
    silence_s: float = 0.0  # the longest
    ended: float = 0.0  # time.monotonic()


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Answer:
    """One stream."""
    answer, heard = Answer(), time.monotonic()
    try:
        async with client.stream("POST", url + "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.problem = f"{response.status_code} {(await response.aread()).decode()[:200]}"
                return answer
            async for line in response.aiter_lines():
                now = time.monotonic()
                heard, answer.silence_s = now, max(answer.silence_s, now - heard)
                if line == "data: [DONE]":
                    answer.problem = ""
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        answer.problem = str(event["error"])
                        return answer
                    answer.text += event["choices"][0]["text"]
    except httpx.HTTPError as error:
        answer.problem = f"{type(error).__name__}: {error}"
    finally:
        answer.ended = time.monotonic()
    return answer


async def ask_again(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Answer:
    """Until there is a whole answer."""
    ended = time.monotonic() + ASK_TIMEOUT_S
    answer = await ask(client, url, body)
    while answer.problem and time.monotonic() < ended:
        await asyncio.sleep(RETRY_S)
        answer = await ask(client, url, body)
    return answer


def ask_all(hosts: Hosts, bodies: Sequence[dict[str, Any]], *, again: bool = False) -> list[Answer]:
    """All at once; with ``again`` as often as it takes."""

    async def run() -> list[Answer]:
        timeout = httpx.Timeout(ASK_TIMEOUT_S, read=RETRY_READ_S if again else ASK_TIMEOUT_S)
        async with httpx.AsyncClient(timeout=timeout, limits=httpx.Limits(max_connections=None)) as client:
            how = ask_again if again else ask
            return list(await asyncio.gather(*(how(client, hosts.server.url, body) for body in bodies)))

    return hosts.run(lambda: asyncio.run(run()))


def run_cell(hosts: Hosts, role: str, fault: str, seed: int) -> dict[str, Any]:
    """One fault."""
    bodies = make_bodies(seed)
    begun = time.monotonic()
    expected = ask_all(hosts, bodies)
    alone_s = time.monotonic() - begun
    wait_until(hosts.is_idle, 60, hosts.status)
    is_front = role in FRONT
    if is_front:
        time.sleep(STANDBY_S)
        victim, host, pid = role, 0, hosts.find(FRONT[role])
    else:
        victim = names_of(hosts.status(), role)[seed % 2]
        host, pid = hosts.host_of(victim), hosts.worker(victim)["pid"]
    delay_s = random.Random(seed).uniform(0.05, 0.6) * alone_s
    with ThreadPoolExecutor(1) as pool:
        salted = [body | {"cache_salt": "again"} for body in bodies]  # nothing is found in a prefix cache
        asking = pool.submit(ask_all, hosts, salted, again=is_front)
        time.sleep(delay_s)
        hit = time.monotonic()
        hit_by(hosts, fault, pid, host)
        lost_s = None
        while time.monotonic() < hit + DOWN_S and not is_front:
            if lost_s is None and (not (seen := hosts.worker(victim))["alive"] or seen["pid"] != pid):
                lost_s = time.monotonic() - hit
            time.sleep(0.02)
        hosts.heal(host)
        if fault == "freeze" and not is_front:
            os.kill(pid, signal.SIGCONT)
        answers = asking.result()
    wrong = [
        f"stream {number}: {answer.problem or 'another text'}"
        for number, (answer, alone) in enumerate(zip(answers, expected, strict=True))
        if answer.problem or answer.text != alone.text
    ]
    early = [f"stream {number} without a fault: {each.problem}" for number, each in enumerate(expected) if each.problem]
    held = ""
    try:
        wait_until(hosts.is_idle, 90)
    except AssertionError:
        held = json.dumps(hosts.status()["workers"])
    return {
        "role": role,
        "fault": fault,
        "host": host,  # 0 is the endpoint's: what is cut off then are all other hosts
        "seed": seed,
        "hit_after_s": round(delay_s, 2),
        "alone_s": round(alone_s, 2),
        "detected_s": None if lost_s is None else round(lost_s, 2),
        "longest_silence_s": round(max(answer.silence_s for answer in answers), 2),
        "all_answered_s": round(max(answer.ended for answer in answers) - hit, 2),
        "exact": len(answers) - len(wrong),
        "of": len(answers),
        "wrong": wrong + early,
        "held": held,
    }


def hit_by(hosts: Hosts, fault: str, pid: int, host: int) -> None:
    """Let it happen."""
    if fault == "cut":
        hosts.cut(host)
    elif fault == "mute":
        hosts.mute(host)
    else:
        os.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


def main() -> int:
    """Run the cells; 0 if all are good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="cells for each role and fault")
    parser.add_argument("--only", nargs="+", default=[""], help="cells whose 'role fault' has one of these")
    parser.add_argument("--listens", action="store_true", help="server.proxy=false")
    parser.add_argument("--mbit", type=float, default=1000, help="of each host's port")
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    overrides = [*OVERRIDES, f"server.proxy={not options.listens}", f"server.standby={options.listens}"]
    results = []
    with (
        tempfile.TemporaryDirectory() as folder,
        start_hosts(Path(folder), *overrides, mbit=options.mbit) as hosts,
    ):
        cells = [(role, fault, seed) for seed in range(options.seeds) for role in ROLES for fault in FAULTS]
        front = ["endpoint"] if options.listens else list(FRONT)
        cells += [(role, fault, seed) for seed in range(options.seeds) for role in front for fault in FAULTS[:2]]
        for role, fault, seed in cells:
            if any(words in f"{role} {fault}" for words in options.only):
                results.append(run_cell(hosts, role, fault, seed))
                logger.info("%s %s", "good" if is_good(results[-1]) else "BAD", results[-1])
    return report("multihost", options, results)


if __name__ == "__main__":
    sys.exit(main())
