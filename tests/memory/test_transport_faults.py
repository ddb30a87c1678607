"""Peers that die or freeze: real processes, SIGKILL and SIGSTOP. Each side ends its half within its own timeouts."""

import base64
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memory.stream import Stream
from memory.transport import KVStream
from tests.memory.kv_pair import CONFIG, LAYOUT, NAMES, Pair, make_pair, ship

ROOT = Path(__file__).parents[2]

BIG = replace(LAYOUT, page_size=1 << 15)  # blocks of 8 MiB

# A sender that ships part of a grant, then goes on computing (that is, sleeping) with the stream open.
SENDER = """
import sys, time
from memory.transport import TRANSPORTS
from tests.memory.kv_pair import LAYOUT
from tests.memory.test_transport_faults import decode
name, config = decode(sys.argv[1])
pool = TRANSPORTS.get(name).allocate(LAYOUT, 8)
sender = TRANSPORTS.get(name).make_sender(pool, config)
print("ready", flush=True)
stream = sender.open(decode(sys.stdin.readline()), on_acked=print, on_failed=print)
stream.send(0, [0, 1], [0, 1])
time.sleep(60)
"""

# A receiver that grants some leases.
RECEIVER = """
import sys, time
from memory.pages import PagePool
from memory.transport import TRANSPORTS
from tests.memory.test_transport_faults import decode, encode
name, config, layout = decode(sys.argv[1])
receiver = TRANSPORTS.get(name).make_receiver(PagePool(layout, 8), config, on_commit=print, on_failed=print)
two = {"page_idxs": [0, 1], "num_tokens": 2 * layout.page_size}
grants = [receiver.grant(str(idx), [2 * idx, 2 * idx + 1], **two) for idx in range(4)]
print(encode(grants), flush=True)
time.sleep(60)
"""


def encode(message: Any) -> str:
    """``message`` on one line."""
    return base64.b64encode(pickle.dumps(message)).decode()


def decode(line: str) -> Any:
    """The message that ``encode`` wrote."""
    return pickle.loads(base64.b64decode(line))


@contextmanager
def run_script(script: str, *arguments: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the first line it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, encode(arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate(timeout=10)


def freeze(process: subprocess.Popen[str]) -> None:
    """Stop the process; it has stopped when this returns."""
    process.send_signal(signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])


def wait_until_received(pair: Pair, num_bytes: int) -> None:
    """Wait until so much has arrived."""
    deadline = time.monotonic() + 10
    while pair.receiver.bytes_received < num_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_welcome(stream: KVStream) -> None:
    """Wait until the stream's link has the receiver's nonce, of which its key is made."""
    assert isinstance(stream, Stream)
    deadline = time.monotonic() + 10
    while not stream.key:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("name", "how"), [("tcp", signal.SIGKILL), ("shared_memory", signal.SIGKILL), ("shared_memory", signal.SIGSTOP)]
)
def test_sender_dies_or_freezes(name: str, how: signal.Signals) -> None:
    config = replace(CONFIG, lease_ttl_s=1.0)
    with make_pair(name, config) as pair, run_script(SENDER, name, config) as (process, line):
        assert line == "ready"
        assert process.stdin is not None
        process.stdin.write(encode(pair.grant([0, 1])) + "\n")
        process.stdin.flush()
        wait_until_received(pair, 2 * LAYOUT.block_bytes)
        process.send_signal(how)
        kind, request_id, reason = pair.event()
        assert (kind, request_id) == ("failed", "r")
        assert ("gone" if how == signal.SIGKILL else "no progress") in reason
        assert pair.receiver.num_leases == 0
        assert pair.is_silent()


@pytest.mark.parametrize("name", NAMES)
def test_receiver_freezes_and_dies(name: str) -> None:
    """It freezes before the sender connects, while layers are computed, with everything sent; then it is killed."""
    config = replace(CONFIG, connect_timeout_s=0.5, send_timeout_s=0.5, lease_ttl_s=60)
    with make_pair(name, config) as pair, run_script(RECEIVER, name, config, LAYOUT) as (process, line):
        before, during, after, killed = decode(line)
        freeze(process)
        pair.open(before)
        assert "no welcome within 0.5 s" in pair.answer()[2]
        process.send_signal(signal.SIGCONT)

        stream = pair.open(during)
        stream.send(0, [0, 1], [0, 1])
        assert pair.is_silent(0.8)  # it is answered
        freeze(process)
        assert "no answer within 0.5 s" in pair.answer()[2]
        process.send_signal(signal.SIGCONT)

        stream = pair.open(after)
        wait_until_welcome(stream)
        assert pair.is_silent()
        freeze(process)
        ship(stream, [0, 1])
        assert "no answer within 0.5 s" in pair.answer()[2]
        process.send_signal(signal.SIGCONT)

        stream = pair.open(killed)
        wait_until_welcome(stream)
        stream.send(0, [0, 1], [0, 1])
        assert pair.is_silent()
        process.kill()
        assert re.search("closed the connection|reset", pair.answer()[2])


def test_receiver_freezes_inside_a_frame() -> None:
    """More is in flight than the kernel buffers."""
    config = replace(CONFIG, connect_timeout_s=0.5, send_timeout_s=0.5)
    with (
        make_pair("tcp", config, layout=BIG, num_pages=2) as pair,
        run_script(RECEIVER, "tcp", config, BIG) as (process, line),
    ):
        stream = pair.open(decode(line)[0])
        assert pair.is_silent(0.2)
        freeze(process)
        for layer_idx in range(LAYOUT.num_layers):
            stream.send(layer_idx, [0, 1], [0, 1])
        assert re.search("took no data in time|no answer", pair.answer()[2])
