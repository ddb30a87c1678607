"""Floating-point operations of training: against a count by hand, and against torch's counter on a real model."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from longctx.models.checkpoint import inspect_checkpoint
from longctx.training.config import TrainAttentionConfig
from longctx.training.flops import count_area, count_linear_weights, count_training_flops

DEMO = inspect_checkpoint("demo")


def test_demo_by_hand():
    # 4 layers of 4 query and 2 KV heads of 64, hidden 256, MLP 704; 260 rows in the output head
    linear_weights = 4 * (256 * 256 + 2 * 256 * 128 + 256 * 256 + 3 * 256 * 704) + 256 * 260
    assert count_linear_weights(DEMO) == linear_weights
    pairs = 3 * 4 // 2 + 5 * 6 // 2  # documents of 3 and 5 tokens
    attention = 4 * pairs * 4 * 64 * 2 * 6
    assert count_training_flops(DEMO, (0, 3, 8)) == 8 * linear_weights * 6 + attention
    assert count_training_flops(DEMO, (0, 3, 8), trains_base=False, num_adapter_weights=100) == (
        8 * (linear_weights * 4 + 100 * 6) + attention
    )


@pytest.mark.parametrize("window", [None, 1, 3, 4, 100])
@pytest.mark.parametrize("cu_seqlens", [(0, 9), (0, 1, 4, 4, 9), (0, 4, 8)])
def test_area_is_what_a_mask_leaves(cu_seqlens, window):
    document = [index for index, stop in enumerate(cu_seqlens[1:]) for _ in range(stop - cu_seqlens[index])]
    pairs = sum(
        document[q] == document[k] and k <= q and (window is None or q - k < window) for q in range(len(document))
        for k in range(len(document))
    )  # fmt: skip
    assert count_area(cu_seqlens, window) == pairs


def test_windows_of_layers_count():
    narrow = dataclasses.replace(DEMO, sliding_windows=(None, 2, 2, 2))
    fewer = 3 * (count_area((0, 8)) - count_area((0, 8), 2)) * 4 * 64 * 2 * 6
    assert count_training_flops(DEMO, (0, 8)) - count_training_flops(narrow, (0, 8)) == fewer


def test_shifted_groups_and_sinks_by_hand():
    attention = TrainAttentionConfig(name="sf", group_size=4, sink_tokens=1, returned_heads=0.0)
    plain = 3 * (4 * 5 // 2) + 8  # of 12 tokens, three groups; 8 queries are behind the first and see a sink
    shifted = 2 * (2 * 3 // 2) + 2 * (4 * 5 // 2) + 10  # groups of 2, 4, 4 and 2
    dense = count_training_flops(DEMO, (0, 12)) - 4 * 4 * count_area((0, 12)) * 64 * 2 * 6
    assert count_training_flops(DEMO, (0, 12), attention=attention) == dense + 4 * 2 * (plain + shifted) * 64 * 2 * 6


@pytest.mark.parametrize("trains_base", [True, False])
def test_torch_counts_the_same(trains_base):
    num_tokens = 32
    config = AutoConfig.from_pretrained(DEMO.path)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    if not trains_base:
        model.requires_grad_(False)
    embeddings = torch.zeros(1, num_tokens, DEMO.hidden_size, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        model(inputs_embeds=embeddings, use_cache=False).logits.sum().backward()
    # eager attention computes what the mask leaves out, too
    hidden = (num_tokens**2 - count_area((0, num_tokens))) * 4 * 4 * 64 * 2 * 6
    assert counter.get_total_flops() == count_training_flops(DEMO, (0, num_tokens), trains_base=trains_base) + hidden


@pytest.mark.parametrize("cu_seqlens", [(0, 1), (0, 23), (0, 5, 5, 30)])
def test_landmark_counts_what_each_query_sees(cu_seqlens):
    attention = TrainAttentionConfig(name="landmark", block_size=3)
    entries = 0
    for start, stop in pairwise(cu_seqlens):
        for position in range(stop - start):
            block, offset = divmod(position, 4)
            own = min(offset + 1, 3)
            entries += (own + 4 * block) + (own + 3 * block)
    linear = cu_seqlens[-1] * count_linear_weights(DEMO) * 6
    expected = linear + 4 * 4 * entries * 3 * 2 * 64
    assert count_training_flops(DEMO, cu_seqlens, attention=attention) == expected


@pytest.mark.parametrize("cu_seqlens", [(0, 1), (0, 23), (0, 5, 5, 30)])
@pytest.mark.parametrize("head_pooling", ["weights", "query"])
def test_cca_counts_cores_window_and_pooling(cu_seqlens, head_pooling):
    attention = TrainAttentionConfig(
        name="cca", group_size=3, window=5, core_position="last", head_pooling=head_pooling
    )
    seen, pooled = 0, 0
    for start, stop in pairwise(cu_seqlens):
        for position in range(stop - start):
            cores = max(0, (position + 1 - 5) // 3)
            seen += cores + position + 1 - 3 * cores
            pooled += position < max(0, stop - start - 5) // 3 * 3
    pooled *= (4 if head_pooling == "weights" else 2) + 2 * 2
    linear = cu_seqlens[-1] * count_linear_weights(DEMO) * 6
    expected = linear + 4 * (4 * seen * 2 + pooled) * 3 * 2 * 64
    assert count_training_flops(DEMO, cu_seqlens, attention=attention) == expected
