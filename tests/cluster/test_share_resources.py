"""What Ray reserves for each process."""

import dataclasses

import pytest

from cluster.config import ClusterConfig, DecodeConfig, PrefillConfig, ServeConfig
from cluster.resources import share_resources
from longctx.models.config import ModelConfig


@pytest.mark.parametrize(
    ("nodes", "options", "device", "expected"),
    [
        ([{"CPU": 2}], {}, "auto", (1.0, 0.0)),
        ([{"CPU": 2}], {"prefill": PrefillConfig(4)}, "auto", (0.4, 0.0)),
        ([{"CPU": 16, "GPU": 8}], {}, "auto", (1.0, 1.0)),
        ([{"CPU": 16, "GPU": 1}], {}, "cuda", (1.0, 0.5)),
        ([{"CPU": 16, "GPU": 1}], {"decode": DecodeConfig(2)}, "cuda", (1.0, 0.33)),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 8}], {"worker_gpus": 2.0, "worker_cpus": 3.0}, "auto", (3.0, 2.0)),
        ([{"CPU": 16, "GPU": 4}], {}, "cpu", (1.0, 0.0)),
    ],
)
def test_processes_share_what_there_is(nodes, options, device, expected):
    config = ServeConfig(model=ModelConfig(device=device), cluster=dataclasses.replace(ClusterConfig(), **options))
    assert share_resources(config, nodes, "decode") == pytest.approx(expected)


def test_nodes_of_mixed_kinds():
    """Prompts are computed on GPUs, text is generated on CPUs."""
    cluster = ClusterConfig(prefill=PrefillConfig(worker_gpus=1.0), decode=DecodeConfig(worker_gpus=0.0))
    config = ServeConfig(cluster=cluster)
    nodes = [{"CPU": 32, "GPU": 8}, {"CPU": 32}]
    assert [share_resources(config, nodes, role) for role in ("prefill", "decode")] == [(1.0, 1.0), (1.0, 0.0)]
