"""What Ray reserves for each process."""

import dataclasses

import pytest

from cluster.autoscale.config import AutoscaleConfig, DecodeScaling, PrefillScaling
from cluster.config import ClusterConfig, DecodeConfig, PrefillConfig, ServeConfig
from cluster.resources import Needs, Node, find_needs, list_nodes, share_resources, suits
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
    assert share_resources(config, list(map(Node, nodes)), "decode") == pytest.approx(expected)


def test_nodes_of_mixed_kinds():
    """Prompts are computed on GPUs, text is generated on CPUs."""
    cluster = ClusterConfig(prefill=PrefillConfig(worker_gpus=1.0), decode=DecodeConfig(worker_gpus=0.0))
    config = ServeConfig(cluster=cluster)
    nodes = [Node({"CPU": 32, "GPU": 8}), Node({"CPU": 32})]
    assert [share_resources(config, nodes, role) for role in ("prefill", "decode")] == [(1.0, 1.0), (1.0, 0.0)]


H100, A100 = ({"CPU": 64.0, "GPU": 8.0, f"accelerator_type:{kind}": 1.0} for kind in ("H100", "A100"))


def test_each_role_has_its_kind_of_node():
    """Prompts on H100s, tokens on A100s: each shares its own nodes' GPUs, and asks Ray for its kind."""
    cluster = ClusterConfig(
        num_prefill_workers=4,
        num_decode_workers=16,
        prefill=PrefillConfig(accelerator_type="H100"),
        decode=DecodeConfig(accelerator_type="A100"),
    )
    nodes = [Node(H100), Node(A100)]
    needs = [find_needs(ServeConfig(cluster=cluster), nodes, role) for role in ("prefill", "decode")]
    assert [(each.num_gpus, each.resources) for each in needs] == [
        (1.0, {"accelerator_type:H100": 0.001}),
        (0.5, {"accelerator_type:A100": 0.001}),
    ]
    assert needs[0].bundle == {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}
    assert str(needs[1]) == "1 CPUs, 0.5 GPUs, 0.001 accelerator_type:A100"


def test_pools_that_grow_find_room():
    """What is reserved is what the largest pools allow."""
    scaling = AutoscaleConfig(enabled=True, decode=DecodeScaling(max_workers=4), prefill=PrefillScaling(max_workers=4))
    config = ServeConfig(cluster=ClusterConfig(autoscale=scaling))
    assert share_resources(config, [Node({"CPU": 4.0})], "decode") == (0.5, 0.0)
    assert config.cluster.max_processes == 8


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("spot", [True, False, False]), ("!spot", [False, True, True]), ("in(spot, on-demand)", [True, True, False])],
)
def test_labels_choose_nodes(wanted, expected):
    entries = [
        {"Alive": True, "Resources": {}, "Labels": labels}
        for labels in ({"market": "spot"}, {"market": "on-demand"}, {})
    ]
    own = PrefillConfig(node_labels={"market": wanted})
    assert [suits(own, node) for node in list_nodes([*entries, {"Alive": False, "Resources": {}}])] == expected


def test_engines_have_what_is_their_own():
    config = ServeConfig(cluster=ClusterConfig(prefill=PrefillConfig(kv_bytes="1GiB", max_batch_tokens=8192)))
    assert (config.engine_of("prefill").kv_bytes, config.engine_of("prefill").max_batch_tokens) == ("1GiB", 8192)
    assert config.engine_of("decode") == config.engine
    assert PrefillConfig(resources={"slot": "2"}, worker_gpus=0.0).read_resources() == {"slot": 2.0}
    assert Needs(0.5, 0.0, {"slot": 2.0}).bundle == {"CPU": 0.5, "slot": 2.0}
