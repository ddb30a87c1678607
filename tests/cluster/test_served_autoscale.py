"""``longctx serve`` with pools that grow and shrink: on a Ray of its own, and in one that has too little room."""

import concurrent.futures
import random
import re
import signal
from pathlib import Path

import pytest

from tests.cli_server import CliServer, launch, run_longctx, wait_until
from tests.ray_nodes import start_nodes

pytestmark = pytest.mark.slow

COMPLETIONS = "/v1/completions"
DOCUMENT = Path(random.__file__).read_text()  # a byte is a token
SCALING = (
    "cluster.autoscale.enabled=true",
    "cluster.autoscale.grow_after_s=2",
    "cluster.autoscale.shrink_after_s=5",
    "cluster.autoscale.cooldown_s=2",
    "cluster.autoscale.window_s=5",
    "model.dtype=float32",
    "engine.max_sequences=2",
)


def ask(server: CliServer, number: int) -> str:
    """Some text behind another beginning for each number; most are long enough to be shipped."""
    prompt = f"# {number}\n" + DOCUMENT[100 * number : 100 * number + (700 if number % 3 else 90)]
    fields = {"prompt": prompt, "max_tokens": 150, "temperature": 0, "ignore_eos": True}
    response = server.post(COMPLETIONS, **fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def pool(server: CliServer, role: str) -> dict:
    return next(pool for pool in server.status()["pools"] if pool["role"] == role)


def test_grows_under_load_and_shrinks_when_idle(tmp_path):
    """Every answer is what it is without load, none is lost while workers come and go, and nothing is left behind."""
    with launch(tmp_path, *SCALING, "cluster.autoscale.decode.max_workers=2") as server:
        server.wait_until_ready()
        alone = [ask(server, number) for number in range(6)]
        with concurrent.futures.ThreadPoolExecutor(12) as threads:
            answers = [threads.submit(ask, server, number % 6) for number in range(36)]
            wait_until(lambda: pool(server, "decode")["num_live"] == 2, 120, server.output)
            server.look()
            # those that wait in the first worker's queue stay there; new ones go to the other
            more = [threads.submit(ask, server, number % 6) for number in range(12)]
            together = [answer.result() for answer in answers + more]
        assert together == alone * 8
        wait_until(lambda: len(server.status()["workers"]) == 2, 120, server.output)
        wait_until(lambda: pool(server, "decode")["target_workers"] == 1, 30, server.status)
        state = pool(server, "decode")
        assert (state["num_live"], state["num_grown"], state["num_shrunk"]) == (1, 1, 1)
        assert pool(server, "prefill")["decision"] == ""
        assert [ask(server, number) for number in range(6)] == alone
        assert server.stop(signal.SIGINT) == 0
        wait_until(lambda: not server.left_behind(), 10.0, server.left_behind)
    assert "Traceback" not in server.output()
    assert re.search(r"decode pool: from 1 to 2 workers \(\d+ requests without room", server.output())


def test_what_has_no_room_stays_a_demand_of_the_cluster(tmp_path):
    """Ray's autoscaler would add a node for it; here nobody does, and it is given up."""
    room = ("cluster.worker_cpus=0.2", "cluster.decode.worker_cpus=1.4", "cluster.autoscale.place_timeout_s=20")
    limits = ("cluster.autoscale.decode.max_workers=2", "cluster.autoscale.retry_s=300")
    with start_nodes(tmp_path, 2) as nodes:
        overrides = [*SCALING, *room, *limits, f"ray.address={nodes.address}"]
        with launch(tmp_path, *overrides, env=nodes.env) as server:
            server.wait_until_ready()
            with concurrent.futures.ThreadPoolExecutor(12) as threads:
                answers = [threads.submit(ask, server, number % 6) for number in range(24)]
                wait_until(lambda: pool(server, "decode")["starts"], 60, server.output)
                (start,) = pool(server, "decode")["starts"]
                assert (start["name"], start["stage"]) == ("decode-1", "placing")
                shown = run_longctx("status", f"server.port={server.port}").stdout
                assert "decode-1 waits for a place in the Ray cluster" in shown
                wait_until(lambda: pool(server, "decode")["num_failed"], 120, server.output)
                assert len({answer.result() for answer in answers}) == 6
            wait_until(lambda: not pool(server, "decode")["starts"], 10, server.status)
            wait_until(lambda: pool(server, "decode")["retry_s"] > 200, 10, server.status)
            assert pool(server, "decode")["num_live"] == 1
            assert server.stop(signal.SIGTERM) == 0
            wait_until(lambda: not server.left_behind(), 20.0, server.left_behind)
    assert "decode-1 is given up: it found no room in the Ray cluster in 20 s" in server.output()
