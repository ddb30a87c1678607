"""How long clients wait for the next answer when the endpoint's process is killed or frozen, and another stands by.

    python -m benchmarks.takeover --save takeover

The demo model on a local Ray. Each round hits the process that listens and asks again and again, a request at a time,
until there is an answer; the time runs from the signal to the end of that answer. Rounds of the two faults take turns.
"""

import argparse
import json
import logging
import signal
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.machine import describe_run, keep_result
from cluster.serve_app import STANDBY_DELAY_S
from tests.cli_server import CliServer, launch, wait_until
from tests.cluster.test_standby import replicas, serving

logger = logging.getLogger(__name__)

FAULTS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}
READY_S = STANDBY_DELAY_S + 5  # until who stands by has loaded everything


def main() -> None:
    """Run the rounds and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", help="also write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    seconds: dict[str, list[float]] = {name: [] for name in FAULTS}
    with tempfile.TemporaryDirectory() as folder, launch(Path(folder), "server.standby=true") as server:
        server.wait_until_ready()
        for _ in range(arguments.rounds):
            for name, number in FAULTS.items():
                wait_until(lambda: len(replicas(server)) == 2, 60)
                time.sleep(READY_S)
                seconds[name].append(hit(server, number))
                logger.info("%s: %.2f s", name, seconds[name][-1])
    content = {
        **describe_run("takeover"),
        "standby_timeout_s": 2.0,
        "faults": {
            name: {"seconds": statistics.median(each), "rounds_s": [round(one, 3) for one in each]}
            for name, each in seconds.items()
        },
    }
    print(json.dumps(content, indent=1))
    keep_result(content, arguments.save)


def hit(server: CliServer, number: signal.Signals) -> float:
    """Seconds until the next answer."""
    serving(server).send_signal(number)
    begun = time.monotonic()
    body = {"model": "demo", "prompt": "import os\n", "max_tokens": 4}
    while True:
        try:
            if httpx.post(server.url + "/v1/completions", json=body, timeout=1).status_code == 200:
                return time.monotonic() - begun
        except httpx.HTTPError:
            time.sleep(0.02)


if __name__ == "__main__":
    main()
