"""``longctx serve`` with workers of two ranks each, on a real Ray: the same text, and it outlives its ranks."""

import os
import random
import signal
from pathlib import Path

import psutil
import pytest

from tests.cli_server import launch, wait_until

DOCUMENT = Path(random.__file__).read_text()
QUESTION = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
RANKED = ("cluster.prefill.sp_degree=2", "cluster.decode.sp_degree=2", "cluster.local_prefill_tokens=64")


def answer(server, length: int) -> str:
    response = server.post("/v1/completions", prompt=DOCUMENT[:length], **QUESTION)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def ranks_of(server) -> list[psutil.Process]:
    server.look()
    return [each for each in server.family.values() if each.is_running() and "RankActor" in " ".join(each.cmdline())]


@pytest.mark.slow
def test_ranks_serve_ship_and_are_replaced(tmp_path):
    with launch(tmp_path, "model.dtype=float32", "cluster=colocated") as server:
        server.wait_until_ready()
        expected = {length: answer(server, length) for length in (700, 3000, 5000)}
        assert server.stop() == 0
    with launch(tmp_path, "model.dtype=float32", *RANKED) as server:
        server.wait_until_ready()
        assert {worker["sp_degree"] for worker in server.status()["workers"]} == {2}
        assert {length: answer(server, length) for length in expected} == expected
        wait_until(lambda: server.worker("prefill-0")["bytes_shipped"] > 0, 10)

        for process in ranks_of(server):
            os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not all(worker["alive"] for worker in server.status()["workers"]), 30, server.output)
        wait_until(lambda: all(worker["alive"] for worker in server.status()["workers"]), 180, server.output)
        assert {length: answer(server, length) for length in expected} == expected
        wait_until(server.is_idle, 30, server.status)
        server.look()
        assert server.stop() == 0
        wait_until(lambda: not server.left_behind(), 30, server.left_behind)
