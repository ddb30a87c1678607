"""Every transport: what is sent arrives, once, where it belongs, and each side hears of the end exactly once."""

import gc
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memory.frames import Kind
from memory.layout import KVLayout
from memory.pages import PagePool
from memory.transport import TRANSPORTS
from tests.memory.kv_pair import CONFIG, FRAMED, LAYOUT, NAMES, WAIT_S, Pair, make_pair, make_raw, ship

SOURCE_PAGES = [9, 1, 2, 3, 4, 31, 30, 11]
TARGET_PAGES = [5, 6, 7, 20, 3, 2, 1, 30]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frame_bytes", ["1KiB", "12KiB", "1MiB"])
@pytest.mark.parametrize("num_cached", [0, 1, 5, 8])
def test_round_trip(name: str, frame_bytes: str, num_cached: int) -> None:
    with make_pair(name, replace(CONFIG, frame_bytes=frame_bytes)) as pair:
        grant = pair.grant(TARGET_PAGES[num_cached:], first_page_idx=num_cached)
        stream = pair.open(grant)
        for layer_idx in range(LAYOUT.num_layers):  # as chunked prefill does: in pieces
            stream.send(layer_idx, range(3), SOURCE_PAGES[:3])
            stream.send(layer_idx, range(3, 8), SOURCE_PAGES[3:])
        stream.commit(b"first tokens")
        assert pair.answer() == ("acked", "r")
        assert pair.event() == ("commit", "r", "first tokens")
        assert pair.arrived((SOURCE_PAGES[num_cached:], TARGET_PAGES[num_cached:]))
        shipped = (len(TARGET_PAGES) - num_cached) * LAYOUT.page_bytes
        assert (pair.sender.bytes_shipped, pair.receiver.bytes_received) == (shipped, shipped)
        assert pair.receiver.num_leases == 0
        assert pair.is_silent()


@pytest.mark.parametrize("name", NAMES)
def test_large_blocks(name: str) -> None:
    """Blocks larger than a frame and than socket buffers."""
    layout = KVLayout(2, 32, 128, 256, "float32", "hnd")  # blocks of 8 MiB
    with make_pair(name, layout=layout, num_pages=3) as pair:
        stream = pair.open(pair.grant([2, 0]))
        for layer_idx in range(2):
            stream.send(layer_idx, [0, 1], [0, 1])
        stream.commit(b"")
        assert pair.answer() == ("acked", "r")
        assert pair.arrived(([0, 1], [2, 0]))


@pytest.mark.parametrize("name", NAMES)
def test_leases_interleave(name: str) -> None:
    with make_pair(name) as pair:
        plans = {f"r{idx}": ([idx, 8 + idx, 9 + idx], [3 * idx + 2, 3 * idx, 3 * idx + 1]) for idx in range(5)}
        streams = {key: pair.open(pair.grant(plan[1], request_id=key)) for key, plan in plans.items()}
        for layer_idx in range(LAYOUT.num_layers):
            for slot in range(3):
                for key, stream in streams.items():
                    stream.send(layer_idx, [slot], [plans[key][0][slot]])
        for key, stream in streams.items():
            stream.commit(key.encode())
        assert {pair.event() for _ in plans} == {("commit", key, key) for key in plans}
        assert {pair.answer() for _ in plans} == {("acked", key) for key in plans}
        sources = [page for plan in plans.values() for page in plan[0]]
        assert pair.arrived((sources, [page for plan in plans.values() for page in plan[1]]))
        assert sum(thread.name == "kv-peer" for thread in threading.enumerate()) == 1  # one connection


@pytest.mark.parametrize("name", NAMES)
def test_two_senders(name: str) -> None:
    with make_pair(name) as pair, make_pair(name) as other:
        ship(pair.open(pair.grant([0, 1], request_id="a")), [3, 4])
        stream = other.sender.open(
            pair.grant([5], request_id="b"), on_acked=lambda: pair.answers.put(("acked", "b")), on_failed=print
        )
        ship(stream, [7])
        assert {pair.answer(), pair.answer()} == {("acked", "a"), ("acked", "b")}
        assert torch.equal(pair.target.storage[:, [0, 1]], pair.source.storage[:, [3, 4]])
        assert torch.equal(pair.target.storage[:, 5], other.source.storage[:, 7])


@pytest.mark.parametrize("name", NAMES)
def test_slow_prefill_keeps_its_lease(name: str) -> None:
    with make_pair(name, replace(CONFIG, lease_ttl_s=0.4, send_timeout_s=0.4)) as pair:
        stream = pair.open(pair.grant([0]))
        assert pair.is_silent(1.0)
        for layer_idx in range(LAYOUT.num_layers):
            stream.send(layer_idx, [0], [1])
        stream.commit(b"")
        assert pair.answer() == ("acked", "r")
        assert pair.arrived(([1], [0]))


@pytest.mark.parametrize("name", NAMES)
def test_expired_lease(name: str) -> None:
    with make_pair(name, replace(CONFIG, lease_ttl_s=0.2)) as pair:
        grant = pair.grant([0, 1])
        assert pair.receiver.num_leases == 1
        kind, request_id, reason = pair.event()
        assert (kind, request_id) == ("failed", "r")
        assert "0.2 s" in reason
        assert pair.receiver.num_leases == 0
        ship(pair.open(grant), [0, 1])
        assert "expired" in pair.answer()[2]
        assert pair.is_untouched()
        assert pair.is_silent()


@pytest.mark.parametrize("name", NAMES)
def test_incomplete_commit(name: str) -> None:
    with make_pair(name) as pair:
        stream = pair.open(pair.grant([0, 1]))
        for layer_idx in range(LAYOUT.num_layers):
            stream.send(layer_idx, [0, 1] if layer_idx else [0], [4, 5] if layer_idx else [4])
        stream.commit(b"")
        assert pair.event() == ("failed", "r", "commit with 1 blocks missing")
        assert pair.answer()[0] == "failed"
        assert pair.is_silent()


@pytest.mark.parametrize("name", NAMES)
def test_abort(name: str) -> None:
    with make_pair(name) as pair:
        stream = pair.open(pair.grant([0, 1]))
        stream.send(0, [0, 1], [4, 5])
        stream.abort("the client went away")
        stream.commit(b"")  # too late, ignored
        assert pair.event() == ("failed", "r", "the client went away")
        assert pair.is_silent()


@pytest.mark.parametrize("name", NAMES)
def test_revoke(name: str) -> None:
    with make_pair(name, replace(CONFIG, send_timeout_s=0.8)) as pair:
        stream = pair.open(pair.grant([0, 1]))
        stream.send(0, [0, 1], [4, 5])
        pair.receiver.revoke("r")
        pair.receiver.revoke("r")
        pair.receiver.revoke("unknown")
        pair.target.storage.zero_()
        kind, _, reason = pair.answer()  # the sender hears of it without sending anything more
        assert kind == "failed"
        assert "revoked" in reason
        stream.send(1, [0, 1], [4, 5])
        assert pair.is_silent()
        assert pair.is_untouched()
        ship(pair.open(pair.grant([2])), [3])  # the same request again
        assert pair.answer() == ("acked", "r")


@pytest.mark.parametrize("name", FRAMED)
def test_revoke_inside_a_frame(name: str) -> None:
    """Half of a frame's payload is there when the lease is revoked; the other half must not reach the pages."""
    with make_pair(name) as pair, make_raw(pair) as raw:
        grant = pair.grant([0, 1, 2])
        raw.send(Kind.HELLO, grant, json.dumps(raw.payloads.hello()).encode())
        assert raw.answer()[0] == Kind.PONG
        payload, fields = raw.data(0, 0, [3, 4, 5])
        middle = len(payload) // 2
        raw.send_bytes(raw.pack(Kind.DATA, grant, payload, **fields) + payload[:middle])
        time.sleep(0.2)
        pair.receiver.revoke("r")
        pair.target.storage.fill_(7)  # somebody else's from now on
        raw.send_bytes(payload[middle:])
        raw.send(Kind.PING, grant)
        assert b"revoked" in raw.answer()[1]
        assert (pair.target.storage == 7).all()
        assert pair.is_silent()


@pytest.mark.parametrize(
    "name, delay_s",
    [(name, delay_s) for name in NAMES for delay_s in ([0.001, 0.003, 0.01] if name in FRAMED else [0.003])],
)
def test_revoke_fences_a_running_transfer(name: str, delay_s: float) -> None:
    layout = KVLayout(4, 8, 64, 32, "float32", "hnd")  # blocks of 128 KiB, 32 MiB in all
    with make_pair(name, layout=layout, num_pages=64) as pair:
        stream = pair.open(pair.grant(list(range(64))))
        for layer_idx in range(4):
            stream.send(layer_idx, range(64), range(64))
        time.sleep(delay_s)
        pair.receiver.revoke("r")
        pair.target.storage.fill_(0)
        stream.commit(b"")
        assert pair.answer()[0] == "failed"
        assert pair.is_untouched()
        assert pair.events.empty()


def test_revoke_waits_for_the_callback() -> None:
    """A callback that had begun is over when ``revoke`` returns; one that revokes its own lease does not deadlock."""
    finished = threading.Event()
    started = threading.Event()

    def commit(request_id: str, payload: bytes) -> None:
        started.set()
        receiver.revoke(request_id)
        time.sleep(0.2)
        finished.set()

    with make_pair("tcp") as pair:
        transport = TRANSPORTS.get("tcp")
        receiver = transport.make_receiver(PagePool(LAYOUT, 2), CONFIG, on_commit=commit, on_failed=lambda *_: None)
        ship(pair.open(receiver.grant("r", [0], page_idxs=[0], num_tokens=16)), [1])
        assert started.wait(WAIT_S)
        receiver.revoke("r")
        assert finished.is_set()
        receiver.close()


@pytest.mark.parametrize("name", NAMES)
def test_unreachable_receiver(name: str) -> None:
    with make_pair(name) as pair:
        grant = pair.grant([0])
        pair.receiver.close()
        ship(pair.open(grant), [0])
        assert "ECONNREFUSED" in pair.answer()[2]
        assert pair.events.empty()
        with pytest.raises(RuntimeError, match="closed"):
            pair.grant([1], request_id="s")


@pytest.mark.parametrize("name", NAMES)
def test_receiver_closes(name: str) -> None:
    with make_pair(name) as pair:
        pair.open(pair.grant([0])).send(0, [0], [1])
        assert pair.is_silent(0.1)
        pair.receiver.close()
        assert pair.answer()[0] == "failed"
        assert pair.is_silent()


@pytest.mark.parametrize("name", NAMES)
def test_sender_closes(name: str) -> None:
    with make_pair(name) as pair:
        pair.open(pair.grant([0])).send(0, [0], [1])
        assert pair.is_silent(0.1)
        pair.sender.close()
        assert "closed" in pair.answer()[2]
        assert pair.event()[0] == "failed"
        with pytest.raises(RuntimeError, match="closed"):
            pair.open(pair.grant([1], request_id="s"))


@pytest.mark.parametrize("name", NAMES)
def test_close_leaves_nothing(name: str) -> None:
    def left() -> tuple[set[str], set[str], int]:
        threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("kv-")}
        segments = {path.name for path in Path("/dev/shm").glob(f"longctx-{os.getpid()}-*")}
        gc.collect()  # mappings, of this pair and of earlier ones, hold file descriptors
        return threads, segments, len(os.listdir("/proc/self/fd"))

    before = left()
    pair = Pair(name)
    ship(pair.open(pair.grant([0])), [1])
    assert pair.answer()[0] == "acked"
    pair.open(pair.grant([0]))  # still open when both close
    pair.close()
    pair.close()
    del pair
    assert left() == before


def test_wrong_use() -> None:
    with make_pair("tcp") as pair:
        grant = pair.grant([0, 1], first_page_idx=2)
        with pytest.raises(ValueError, match="layout"):
            pair.open(replace(grant, layout=replace(LAYOUT, num_layers=4)))
        with pytest.raises(ValueError, match="transport"):
            pair.open(replace(grant, transport="shared_memory"))
        with pytest.raises(ValueError, match="already holds"):
            pair.grant([3])
        for pages in ([32], [-1], [3, 3]):
            with pytest.raises(ValueError, match=r"0\.\.31"):
                pair.grant(pages, request_id="s")
        for page_idxs, message in (([0], "one for each"), ([1, 1], "rising"), ([1, 0], "rising"), ([-1, 0], "from 0")):
            with pytest.raises(ValueError, match=message):
                pair.grant([4, 5], request_id="s", page_idxs=page_idxs)
        with pytest.raises(ValueError, match="num_senders=0"):
            pair.receiver.grant("s", [4], page_idxs=[0], num_tokens=16, num_senders=0)
        stream = pair.open(grant)
        with pytest.raises(ValueError, match="layer 3"):
            stream.send(3, [2, 3], [0, 1])
        with pytest.raises(ValueError, match=r"pages \[32\]"):
            stream.send(0, [2], [32])
        with pytest.raises(ValueError, match="ends at 4"):
            stream.send(0, [2, 3, 4], [0, 1, 2])
        with pytest.raises(ValueError, match="one for each"):
            stream.send(0, [2, 3], [0])
        assert pair.receiver.num_leases == 1
    with make_pair("shared_memory") as pair, pytest.raises(TypeError, match="allocate"):
        TRANSPORTS.get("shared_memory").make_sender(pair.target, CONFIG)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_pools() -> None:
    transport = TRANSPORTS.get("tcp")
    source, target = PagePool(LAYOUT, 32, device="cuda"), PagePool(LAYOUT, 32, device="cuda")
    done = threading.Event()
    receiver = transport.make_receiver(target, CONFIG, on_commit=lambda *_: None, on_failed=lambda *_: None)
    sender = transport.make_sender(source, CONFIG)
    grant = receiver.grant("r", TARGET_PAGES, page_idxs=range(8), num_tokens=128)
    stream = sender.open(grant, on_acked=done.set, on_failed=print)
    for layer_idx in range(LAYOUT.num_layers):
        torch.cuda._sleep(10_000_000)  # the copy must wait for what is computed before it
        source.storage[layer_idx].random_(1, 256)
        stream.send(layer_idx, range(8), SOURCE_PAGES)
    stream.commit(b"")
    assert done.wait(WAIT_S)
    expected = torch.zeros_like(target.storage)
    expected[:, TARGET_PAGES] = source.storage[:, SOURCE_PAGES]
    assert torch.equal(target.storage, expected)
    sender.close()
    receiver.close()
