"""Two processes of the endpoint: whoever holds the turn serves; the other takes over from a dead or a frozen one."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.serve_app import STANDBY_DELAY_S
from cluster.standby import Turn
from tests.cli_server import CliServer, launch, wait_until

TAKEN_S = 30.0  # far longer than it takes: benchmarks/takeover.py measures it


def hold(path: Path, taken) -> None:
    turn = Turn(path, patience_s=1.0)
    while not turn.take():
        time.sleep(0.01)
    taken.set()
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_turn_passes_on(tmp_path, number):
    path, taken = tmp_path / "turn", multiprocessing.get_context("fork").Event()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(path, taken), daemon=True)
    holder.start()
    assert taken.wait(10)
    turn = Turn(path, patience_s=1.0)
    for _ in range(30):  # as long as it beats, nobody is hurt
        assert not turn.take()
        turn.free_from_frozen()
        time.sleep(0.05)
    assert holder.is_alive() and not turn.is_over()
    os.kill(holder.pid, number)
    hit = time.monotonic()
    while not turn.take():
        turn.free_from_frozen()
        assert time.monotonic() - hit < TAKEN_S
        time.sleep(0.02)
    if number == signal.SIGSTOP:
        assert time.monotonic() - hit > 0.9  # it was given its time
    holder.join(5)
    assert holder.exitcode == -signal.SIGKILL
    path.unlink()
    assert turn.is_over()
    turn.close()
    turn.close()


def replicas(server: CliServer) -> list[psutil.Process]:
    """The endpoint's processes."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [each for each in children if "ServeReplica" in " ".join(each.cmdline())]


def serving(server: CliServer) -> psutil.Process:
    """The one that listens."""
    (found,) = [
        each for each in replicas(server) if any(c.laddr.port == server.port for c in each.net_connections("tcp"))
    ]
    return found


@pytest.mark.slow
def test_the_endpoint_is_taken_over(tmp_path):
    """Killed, then frozen: seconds later there is an answer, the same as before, and somebody stands by again."""
    with launch(tmp_path, "server.standby=true", "model.dtype=float32") as server:
        server.wait_until_ready()
        prompt = {"prompt": "import os\n" * 100, "max_tokens": 8, "temperature": 0}
        expected = server.post("/v1/completions", **prompt).json()["choices"][0]["text"]
        for number in (signal.SIGKILL, signal.SIGSTOP):
            wait_until(lambda: len(replicas(server)) == 2, 60)
            victim = serving(server)
            (other,) = (each for each in replicas(server) if each.pid != victim.pid)
            time.sleep(STANDBY_DELAY_S + 5)  # it has loaded everything
            victim.send_signal(number)
            hit, text = time.monotonic(), None
            while text is None:
                assert time.monotonic() - hit < TAKEN_S, server.output()
                try:
                    answer = httpx.post(server.url + "/v1/completions", json={"model": "demo"} | prompt, timeout=5)
                    text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else None
                except httpx.HTTPError:
                    time.sleep(0.05)
            assert text == expected
            assert serving(server).pid == other.pid
            assert "this process, which stood by, serves from now on" in server.output()
        wait_until(lambda: len(replicas(server)) == 2, 60)
        assert server.stop(signal.SIGINT) == 0
        wait_until(lambda: not server.left_behind(), 5.0, server.left_behind)
