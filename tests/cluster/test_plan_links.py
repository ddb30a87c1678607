"""``longctx plan links`` on a Ray of its own: real ranks, a file that the planner reads, and nothing left."""

import psutil
import pytest

from parallel.links import load_links
from tests.cli_server import run_longctx

pytestmark = pytest.mark.slow


def test_links_are_measured_and_saved(tmp_path):
    path = tmp_path / "links.json"
    done = run_longctx("plan", "links", "world_size=2", f"file={path}")
    assert done.returncode == 0, done.stderr
    assert "2 ranks on 1 node(s)" in done.stdout
    assert load_links(path).bytes_per_s > 0
    assert not [each for each in psutil.process_iter(["cmdline"]) if f"file={path}" in (each.info["cmdline"] or ())]
    planned = run_longctx("plan", "attention", f"links_file={path}", "num_tokens=1024", "steps=false")
    assert planned.returncode == 0, planned.stderr
    assert "auto takes" in planned.stdout


def test_a_cluster_that_is_not_there_is_named(tmp_path):
    done = run_longctx("plan", "links", "world_size=2", "ray.address=127.0.0.1:1", f"file={tmp_path / 'links.json'}")
    assert done.returncode == 2
    assert "no Ray answers at" in done.stderr
