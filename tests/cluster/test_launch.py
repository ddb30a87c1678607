"""``longctx serve`` from its start to its end: what it prints, how it stops, why it does not start, what it leaves."""

import re
import signal
import socket
import subprocess
import time
from contextlib import suppress

import psutil
import pytest

from tests.cli_server import CliServer, launch, run_longctx, wait_until
from tests.tiny_checkpoints import make_checkpoint

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING) ([\w-]+ )?(cluster|longctx|memory)\.[\w.]+: \S")
PROMPT = "import os\n" * 100  # long enough to be shipped
LEAVE_TIMEOUT_S = 150.0  # Ray's agents look for their killed parent's reasons for a minute


def ask(server: CliServer) -> str:
    response = server.post("/v1/completions", prompt=PROMPT, max_tokens=8, temperature=0)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def check_nothing_is_left(server: CliServer) -> None:
    wait_until(lambda: not server.left_behind(), 5.0, server.left_behind)


def test_serves_and_stops(tmp_path):
    """Ctrl-C ends it with 0 and nothing left; the terminal shows our own lines alone, with all that a user needs."""
    with launch(tmp_path) as server:
        server.wait_until_ready()
        assert ask(server)
        assert len(server.family) > 5
        assert server.left_behind()  # while it runs there is something to find
        assert server.stop(signal.SIGINT) == 0
        check_nothing_is_left(server)
    lines = server.output().splitlines()
    assert [line for line in lines if not LINE.match(line)] == []
    for words in ("loading demo", f"demo on {server.url}/v1; Ctrl-C stops it", f"curl -s {server.url}/v1/", "stopped"):
        assert any(words in line for line in lines), lines


def test_says_how_to_ask(tmp_path, served):
    """The command that it prints is one that works."""
    command = re.search(r"ask it: (curl .*)", served.output())
    assert command is not None
    done = subprocess.run(
        command[1].replace("KEY", served.key), shell=True, capture_output=True, text=True, timeout=60, check=True
    )
    assert '"object":"text_completion"' in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "numbers", "codes"),
    [
        ("loading", (signal.SIGTERM,), {0}),
        ("ready", (signal.SIGTERM, signal.SIGTERM), {0, 130}),  # the first may be seen with the second
        ("ready", (signal.SIGKILL,), {-signal.SIGKILL}),
    ],
    ids=["SIGTERM", "SIGTERM twice", "SIGKILL"],
)
def test_signals(tmp_path, when, numbers, codes):
    """At any moment, nothing is left; after SIGKILL processes end by themselves, and the next start sweeps the rest."""
    with launch(tmp_path) as server:
        if when == "ready":
            server.wait_until_ready()
            ask(server)
        else:
            wait_until(lambda: server.look() or len(server.family) > 6, 120, server.output)
        server.look()
        for number in numbers:
            server.process.send_signal(number)
            time.sleep(0.5)
        code = server.process.wait(60)
        assert code in codes, server.output()
        if signal.SIGKILL not in numbers:
            check_nothing_is_left(server)
            assert "Traceback" not in server.output()
            return
        on_disk = re.compile(r"/dev/shm/|/tmp/")
        wait_until(
            lambda: not [left for left in server.left_behind() if not on_disk.match(left)],
            LEAVE_TIMEOUT_S,
            server.left_behind,
        )
    with launch(tmp_path) as following:
        following.wait_until_ready()
        assert server.left_behind() == []
        assert following.stop() == 0
        check_nothing_is_left(following)


@pytest.mark.slow
def test_a_signal_to_all(tmp_path):
    """``timeout`` and a closed terminal signal the process group, systemd every process: Ray's daemons get it too."""
    with launch(tmp_path) as server:
        server.wait_until_ready()
        for process in server.family.values():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        assert server.process.wait(45) == 0, server.output()  # Ray's client gives up, and aborts, after 60
        check_nothing_is_left(server)


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.3, 4.0])
def test_interrupted_at_any_moment(tmp_path, delay_s):
    """While Ray is imported, while it connects, and while the endpoint is deployed on a thread of its own."""
    with launch(tmp_path) as server:
        wait_until(lambda: server.look() or "loading demo" in server.output(), 60, server.output)
        time.sleep(delay_s)
        assert server.stop(signal.SIGINT) == 0, server.output()
        assert "Traceback" not in server.output()
        check_nothing_is_left(server)


@pytest.mark.slow
def test_ray_dies(tmp_path):
    """Once it is started again, with everything; the second time that is too much."""
    with launch(tmp_path, "ray.max_restarts=1") as server:
        for is_last in (False, True):
            server.wait_until_ready()
            assert server.post("/v1/completions", prompt="import ", max_tokens=4).status_code == 200
            before = dict(server.family)
            [running] = [each for each in before.values() if each.is_running() and each.name() == "gcs_server"]
            running.kill()
            if not is_last:
                wait_until(lambda: server.output().count("loading demo") == 2, 45, server.output)
                assert "Ray stopped under longctx: starting anew" in server.output()
                assert not [each for pid, each in before.items() if pid != server.process.pid and each.is_running()]
                wait_until(lambda: server.output().count("ask it") == 2, 240, server.output)
        assert server.process.wait(45) == 1
        assert server.output().splitlines()[-1] == "error: Ray stopped under longctx"
        check_nothing_is_left(server)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("model.path=/absent",), "/absent"),
        (("engine.kv_bytes=100000GiB",), "engine.kv_bytes=100000GiB"),
        (("ray.address=127.0.0.1:1",), "no Ray answers at"),
        (("ray.address=nowhere",), "ray.address='nowhere' cannot be joined"),
        (("server.api_key_file=/absent",), "/absent"),
        (("server.tls_certificate=/absent",), "server.tls_key=null is not allowed"),
        (("server.tls_certificate=/absent", "server.tls_key=/absent"), "server.tls_key='/absent' cannot be read"),
        (("server.host=203.0.113.1",), "server.host=203.0.113.1"),
        (("server.host=",), "server.host='' is not allowed"),
        (("model.max_context=100000000",), "model.max_context=100000000"),
    ],
    ids=[
        "no checkpoint",
        "memory",
        "no Ray",
        "no address",
        "no keys",
        "no TLS key",
        "no certificate",
        "not our address",
        "every address",
        "context",
    ],
)
def test_failed_starts_say_why(overrides, reason):
    check_failed_start(overrides, reason)


def test_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check_failed_start(
            (f"server.port={port}",), f"server.port={port} cannot be listened on: Address already in use"
        )


def test_missing_shard(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    check_failed_start((f"model.path={folder}",), shards[1].name)


def check_failed_start(overrides: tuple[str, ...], reason: str) -> None:
    started = time.monotonic()
    done = run_longctx("serve", *overrides)
    assert done.returncode in (1, 2)
    assert reason in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60  # two seconds on an idle machine
    assert not [each for each in psutil.process_iter(["cmdline"]) if set(overrides) & set(each.info["cmdline"] or ())]


@pytest.mark.slow
def test_a_worker_that_cannot_start_ends_it(tmp_path):
    """/dev/shm too small for the pages that are to lie there: found out by the worker, said by the command."""
    with launch(tmp_path, "transport=shared_memory", "ray.object_store_bytes=80MiB", prefix=small_shm("50m")) as server:
        wait_until(lambda: server.look() or server.process.poll() is not None, 240, server.output)
        assert server.process.returncode == 1
        assert "prefill-0 cannot start: /dev/shm has" in server.output().splitlines()[-1]
        assert "Traceback" not in server.output()
        check_nothing_is_left(server)


@pytest.mark.slow
def test_without_room_in_shm_kv_travels_by_tcp(tmp_path):
    with launch(tmp_path, "ray.object_store_bytes=80MiB", prefix=small_shm("50m")) as server:
        server.wait_until_ready()
        ask(server)
        assert "KV travels by tcp" in server.output()
        assert server.worker("prefill-0")["transport"] == "tcp"
        wait_until(lambda: server.worker("prefill-0")["bytes_shipped"] > 0)
        assert server.stop() == 0
        check_nothing_is_left(server)


def small_shm(size: str) -> tuple[str, ...]:
    """Words before a command that give it a /dev/shm of its own."""
    script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    words = ("unshare", "--mount", "sh", "-c", script, "sh")
    if subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting takes privileges")
    return words


@pytest.mark.slow
def test_two_decode_workers_and_tcp(tmp_path):
    with launch(tmp_path, "transport=tcp", "cluster.num_decode_workers=2", "model.dtype=float32") as server:
        server.wait_until_ready()
        assert [worker["name"] for worker in server.status()["workers"]] == ["prefill-0", "decode-0", "decode-1"]
        texts = {ask(server) for _ in range(3)}
        assert len(texts) == 1
        wait_until(lambda: server.worker("prefill-0")["transport"] == "tcp", 10, server.status)
        wait_until(lambda: server.worker("prefill-0")["bytes_shipped"] > 0, 10, server.status)
        assert server.stop() == 0
        check_nothing_is_left(server)
