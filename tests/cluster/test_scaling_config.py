"""Combinations of the configuration that no deployment can have are refused, with what is allowed."""

import pytest

from cluster.autoscale.check import check_nodes, check_scaling
from cluster.config import ServeConfig
from longctx.config import compose
from longctx.errors import ConfigError

ON = "cluster.autoscale.enabled=true"


def check(*overrides: str) -> None:
    cluster = compose(ServeConfig, "serve", list(overrides)).cluster
    check_scaling(cluster)
    check_nodes(cluster)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([ON], ["cluster.autoscale.enabled=true", "cluster.autoscale.decode.max_workers"]),
        (
            [ON, "cluster.autoscale.decode.min_workers=3", "cluster.autoscale.decode.max_workers=2"],
            ["decode.min_workers=3", "decode.max_workers=2", "at most as many"],
        ),
        (
            [ON, "cluster.autoscale.decode.max_workers=4", "cluster.num_decode_workers=5"],
            ["cluster.num_decode_workers=5", "from 1 to 4"],
        ),
        (
            [ON, "cluster.autoscale.prefill.max_workers=4", "cluster.num_prefill_workers=0"],
            ["prefill.max_workers=4", "cluster.num_prefill_workers=0", "use cluster.num_prefill_workers=1 or more"],
        ),
        (
            [ON, "cluster.autoscale.decode.max_workers=4", "cluster.autoscale.window_s=0.5"],
            ["cluster.autoscale.window_s=0.5", "at least as long"],
        ),
        (["cluster.prefill.resources={GPU:1}"], ["cluster.prefill.resources", "use worker_gpus"]),
        (["cluster.prefill.resources={slot:0}"], ["slot:0", "no amount above 0"]),
        (["cluster.decode.resources={slot:many}"], ["slot:many", "no amount above 0"]),
        (["cluster.decode.node_labels={market:'a b'}"], ["cluster.decode.node_labels", "in(a,b)"]),
    ],
)
def test_what_cannot_be_is_refused(overrides, words):
    with pytest.raises(ConfigError) as caught:
        check(*overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "cluster.autoscale.decode.min_workers=0",
        "cluster.autoscale.shrink_below=1",
        "cluster.autoscale.ttft_target_s=0",
        "cluster.autoscale.percentile=101",
        "cluster.prefill.rank_strategy=NEAR",
    ],
)
def test_values_have_bounds(override):
    with pytest.raises(ConfigError, match="is not allowed"):
        check(override)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["cluster.autoscale.decode.min_workers=3"],  # off
        [ON, "cluster.autoscale.decode.max_workers=4"],
        [ON, "cluster=colocated", "cluster.autoscale.decode.max_workers=4"],
        ["cluster.prefill.accelerator_type=H100", "cluster.decode.accelerator_type=A100"],
        ["cluster.decode.node_labels={market:'!spot',zone:'in(a,b)'}", "cluster.decode.resources={slot:0.5}"],
    ],
)
def test_what_can_be_is_taken(overrides):
    check(*overrides)
