"""Ray's object store as a transport, between processes of a Ray cluster; objects are freed with their lease."""

import subprocess
import sys
from pathlib import Path

import pytest

from memory.layout import KVLayout
from memory.pages import PagePool
from memory.transport import TRANSPORTS
from tests.memory.kv_pair import CONFIG

SCRIPT = """
import time
import ray
import torch
from memory.transport import TRANSPORTS
from tests.memory.kv_pair import CONFIG, LAYOUT, Pair, ship

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)

@ray.remote(num_cpus=0)
class Sender:
    def __init__(self):
        transport = TRANSPORTS.get("object_store")
        self.pool = transport.allocate(LAYOUT, 32)
        self.pool.storage.random_(1, 256)
        self.sender = transport.make_sender(self.pool, CONFIG)

    def send(self, grant, pages):
        answers = []
        stream = self.sender.open(grant, on_acked=lambda: answers.append("acked"), on_failed=answers.append)
        ship(stream, pages)
        while not answers:
            time.sleep(0.01)
        return answers[0], self.pool.storage[:, pages].numpy(), self.sender.bytes_shipped

    def kept(self):
        (link,) = self.sender._links.values()
        return len(link._payloads._objects)

pair = Pair("object_store")
sender = Sender.remote()
for round in range(3):
    answer, sent, shipped = ray.get(sender.send.remote(pair.grant([5, 3, 4]), [9, 1, 2]))
    assert answer == "acked", answer
    assert torch.equal(pair.target.storage[:, [5, 3, 4]], torch.from_numpy(sent.copy()))
    pair.target.storage.zero_()
    assert pair.event()[0] == "commit"
assert shipped == 9 * LAYOUT.page_bytes == pair.receiver.bytes_received
assert ray.get(sender.kept.remote()) == 0
ray.kill(sender)
grant = pair.grant([7])
pair.close()
print("good")
"""


def test_between_processes() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip().endswith("good"), run.stderr[-3000:]


def test_without_ray() -> None:
    with pytest.raises(RuntimeError, match="processes of a Ray cluster only"):
        TRANSPORTS.get("object_store").make_sender(PagePool(KVLayout(1, 1, 8, 16, "float32", "hnd"), 2), CONFIG)
