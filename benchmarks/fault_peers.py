"""The same faults in longctx and in vLLM's CPU build with NIXL, one prefill and one decode worker each.

    LONGCTX_BENCH_VLLM_PYTHON=... python -m benchmarks.fault_peers --save fault-peers     # about twenty minutes

Both serve the demo model in float32, greedily: in a tiny model of random weights, answers do not depend on the KV, and
a wrong one would not show. What is right is what the same system says undisturbed, under another ``cache_salt``.
"""

import argparse
import json
import logging
import os
import signal
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.fault_systems import CLIENT_S, SHORT, Longctx, System
from benchmarks.fault_vllm import Vllm
from benchmarks.machine import describe_run, keep_result
from benchmarks.peers import SERVED_NAME, VLLM_PYTHON, SkippedError
from tests.cli_server import launch

logger = logging.getLogger(__name__)

NEXT_S = 30.0  # a client tries again this long after a fault
FREED_S = 60.0
NUM_TOKENS = 300  # of an answer that is disturbed in its middle
LONG = 12_000  # characters of a prompt that is disturbed while it is computed
OTHERWISE = {"longctx-splitwise": "decode", "vllm-recompute": "prefill"}  # with another setting, and this worker hit
SIGNALS = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}


def wait_freed(system: System) -> float | None:
    """Seconds until nothing is held; None: longer than ``FREED_S``."""
    begun = time.monotonic()
    while time.monotonic() - begun < FREED_S:
        with suppress(httpx.HTTPError):
            if not system.count_held():
                return round(time.monotonic() - begun, 2)
        time.sleep(0.1)
    return None


def disturb(system: System, role: str, number: signal.Signals) -> dict[str, Any]:
    """A worker is hit: what the client gets, what the next one gets, and how long healing takes."""
    is_between = role == "prefill"
    prompt, next_prompt = system.draw(LONG if is_between else SHORT), system.draw(SHORT)
    max_tokens = 24 if is_between else NUM_TOKENS
    begun = time.monotonic()
    expected = system.expect(prompt, max_tokens)
    undisturbed_s = time.monotonic() - begun
    next_expected = system.expect(next_prompt)
    begun = time.monotonic()
    if is_between:
        answer, seconds = system.hit_between(prompt, number)
    else:

        def hit() -> bool:
            nonlocal begun
            system.signal("decode", number)
            begun = time.monotonic()
            return False

        answer = system.ask(prompt, max_tokens, act=hit)
        seconds = time.monotonic() - begun
    result = {
        "outcome": answer.judge(expected),
        "seconds": round(seconds, 2),
        "undisturbed_s": round(undisturbed_s, 2),
        "detail": answer.detail,
    }
    begun, first = time.monotonic(), None
    result["next_right_after_s"] = None
    while (left_s := NEXT_S - (time.monotonic() - begun)) > 0:
        outcome = system.ask(next_prompt, timeout_s=left_s).judge(next_expected)
        first = first or outcome
        if outcome == "right":
            result["next_right_after_s"] = round(time.monotonic() - begun, 2)
            break
        time.sleep(0.5)
    result["next"] = first
    result["freed_after_s"] = wait_freed(system)
    begun = time.monotonic()
    result["healed_by"] = system.heal()
    result["healed_after_s"] = round(time.monotonic() - begun, 2)
    result["after_healing"] = system.ask(next_prompt).judge(next_expected)
    logger.info("%s %s: %s", role, number.name, result)
    return result


def leave(system: System, *, is_between: bool) -> dict[str, Any]:
    """A client leaves: how long pages stay held."""
    if is_between:
        system.leave_between(system.draw(LONG))
    else:
        assert system.ask(system.draw(SHORT), 10 * NUM_TOKENS, act=lambda: True).end == "left"
    result = {"freed_after_s": wait_freed(system)}
    logger.info("left: %s", result)
    return result


def run_faults(system: System) -> dict[str, Any]:
    """The list, in an order in which nothing is healed in vain."""
    prompt = system.draw(SHORT)
    results: dict[str, Any] = {"undisturbed": {"outcome": system.ask(prompt).judge(system.expect(prompt))}}
    results["client leaves in mid-stream"] = leave(system, is_between=False)
    results["client leaves between prefill and decode"] = leave(system, is_between=True)
    for what in ("replayed", "forged"):
        results[f"{what} handle"] = system.misuse(what)
        logger.info("%s: %s", what, results[f"{what} handle"])
    for role in ("prefill", "decode"):
        for name, number in SIGNALS.items():
            results[f"{role} {name}"] = disturb(system, role, number)
    return results


def main() -> None:
    """Run the list in each system and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=["longctx", *OTHERWISE, "vllm"])
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    content = {**describe_run("fault_peers"), "client_timeout_s": CLIENT_S, "next_within_s": NEXT_S, "systems": {}}
    for name in arguments.systems:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            try:
                system = start(name, Path(folder), stack)
            except SkippedError as reason:
                content["systems"][name] = f"skipped: {reason}"
                continue
            if name in OTHERWISE:
                results = {
                    f"{OTHERWISE[name]} {fault}": disturb(system, OTHERWISE[name], no) for fault, no in SIGNALS.items()
                }
            else:
                results = run_faults(system)
            content["systems"][name] = {"settings": system.settings, "load_1m": os.getloadavg()[0], "faults": results}
        keep_result(content, arguments.save)
    print(json.dumps(content, indent=1))


def start(name: str, folder: Path, stack: ExitStack) -> System:
    """A system, which ends with ``stack``. Raises ``SkippedError``."""
    if name.startswith("longctx"):
        policy = "splitwise" if name == "longctx-splitwise" else "shortest_queue"
        words = ["server.standby=true", "model.dtype=float32", f"model.name={SERVED_NAME}"]
        words += ["cluster.local_prefill_tokens=0", f"cluster.policy={policy}"]
        server = stack.enter_context(launch(folder, *words))
        server.wait_until_ready()
        return Longctx(server, words)
    if not (python := os.environ.get(VLLM_PYTHON)):
        raise SkippedError(f"{VLLM_PYTHON} is not set; benchmarks/README.md says how to install vLLM")
    system = Vllm(python, folder, "recompute" if name == "vllm-recompute" else "fail")
    stack.callback(system.stop)
    system.heal()
    return system


if __name__ == "__main__":
    main()
