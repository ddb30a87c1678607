"""Training on a Ray cluster of three hosts: one is lost in the middle, and the training goes on without it.

The hosts are network namespaces with a ``ray start`` each. Where a test is of what ranks saw, they run
``tests/longctx/gang_body.py``; where it is of what they trained, the trainer.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.networks import can_make_networks, make_network
from tests.cli_server import LONGCTX, wait_until
from tests.longctx.gang_body import make_config, read_seen
from tests.ray_nodes import start_nodes

ROOT = Path(__file__).parent.parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_networks(), reason="network namespaces take root, ip and tc"),
]
TRAIN = (*LONGCTX, "train", "cluster.launcher=ray")
COMMAND = (sys.executable, "-m", "tests.longctx.train_command", "train", "cluster.launcher=ray", "data.path=README.md")
NUM_RANKS = 4


@pytest.mark.multihost  # minutes; the trainer's own below runs with the slow ones
@pytest.mark.parametrize("victim", [1, 2])
def test_a_host_is_lost(tmp_path, victim):
    """Four ranks on three hosts of two CPUs; without one of them they have room on the others."""
    acts = [{"rank": rank, "restart": restart, "act": "add"} for rank in range(NUM_RANKS) for restart in range(2)]
    acts += [{"rank": rank, "restart": 0, "act": "wait"} for rank in range(NUM_RANKS)]
    make_config(tmp_path, acts=acts)
    with (
        make_network(3, "switch", 1000) as network,
        start_nodes(tmp_path, 2, network=network) as cluster,
    ):
        keys = [f"output={tmp_path}", "parallel.sp_degree=4", f"cluster.address={cluster.address}"]
        process = subprocess.Popen(
            [*network.command(0), *COMMAND, *keys, "cluster.strategy=SPREAD"],
            cwd=ROOT,
            env=os.environ | cluster.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_until(lambda: process.poll() is not None or len(list(tmp_path.glob("sum-*.json"))) == NUM_RANKS, 120)
        assert process.poll() is None, process.communicate()[0]
        first = read_seen(tmp_path)
        hosts = [seen["node"].partition(" ")[0] for seen in first]
        assert set(hosts) == {network.address(index) for index in range(3)}
        assert hosts == sorted(hosts, key=hosts.index)  # those of a host are neighbours
        assert {seen["master_address"] for seen in first} == {hosts[0]}
        lost_at = time.monotonic()
        cluster.nodes[victim].kill()
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        assert "starting all ranks again from the last checkpoint (1 of 3)" in output
        again = read_seen(tmp_path, 1)
        assert len(again) == NUM_RANKS, output
        left = {seen["node"].partition(" ")[0] for seen in again}
        assert left == {network.address(index) for index in range(3) if index != victim}
        assert [seen["local_rank"] for seen in again] == [0, 1, 0, 1]
        assert {json.loads((tmp_path / f"sum-{rank}.json").read_text()) for rank in range(NUM_RANKS)} == {6.0}
        assert time.monotonic() - lost_at < 200


def test_a_training_goes_on_from_its_last_checkpoint(tmp_path):
    """A host is lost between two checkpoints: the steps since the last one are made again, and have the same losses."""
    output, num_steps = tmp_path / "run", 24
    with (
        make_network(3, "switch", 1000) as network,
        start_nodes(tmp_path, 2, network=network) as cluster,
    ):
        keys = [
            f"output={output}",
            f"data.path={ROOT / 'README.md'}",
            f"cluster.address={cluster.address}",
            "cluster.strategy=SPREAD",
            "model.dtype=float32",
            "parallel=mixed",
            "train.batch_size=2",
            "train.context_length=256",
            "train.num_threads=1",
            f"train.num_steps={num_steps}",
            "checkpoint.every=4",
            "logger.peak_flops=1e10",
        ]
        log = tmp_path / "train.log"
        with log.open("w") as sink:
            words = [*network.command(0), *TRAIN, *keys]
            process = subprocess.Popen(words, cwd=ROOT, env=os.environ | cluster.env, stdout=sink, stderr=sink)
        wait_until(lambda: process.poll() is not None or re.search(r"step +6/24", log.read_text()), 240, log.read_text)
        assert process.poll() is None, log.read_text()
        cluster.nodes[1].kill()
        process.wait(300)
        text = log.read_text()
        assert process.returncode == 0, text
    before, _, after = text.partition("starting all ranks again from the last checkpoint (1 of 3)")
    first, second = (dict(re.findall(r"step +(\d+)/24 +loss ([\d.]+)", part)) for part in (before, after))
    assert int(next(iter(second))) % 4 == 1
    assert 1 < int(next(iter(second))) <= int(list(first)[-1]) + 1
    assert list(second)[-1] == str(num_steps)
    for step in first.keys() & second.keys():
        assert float(first[step]) == pytest.approx(float(second[step]), abs=2e-4)
    assert (output / "final" / "model.safetensors").exists()
