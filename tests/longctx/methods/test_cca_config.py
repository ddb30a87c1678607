"""Which attention a checkpoint is served with, and what is refused."""

import logging

import pytest

from longctx.attention.config import AttentionConfig, choose_method, warn_untrained
from longctx.errors import ConfigError
from longctx.models.attention_spec import CCASpec
from longctx.models.checkpoint import inspect_checkpoint
from memory.core_pages import CoreCapacity, CoreSizes
from tests.tiny_checkpoints import make_checkpoint

TRAINED = {"name": "cca", "group_size": 8, "window": 32, "core_position": "mean", "head_pooling": "query"}


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("specs")
    long_rope = {"rope_type": "dynamic", "factor": 2.0}
    kinds = {"dense": {}, "cca": {"longctx_attention": TRAINED}, "dynamic": {"rope_scaling": long_rope}}
    made = {name: make_checkpoint(root / name, "llama", **fields) for name, fields in kinds.items()}
    made["windows"] = make_checkpoint(root / "windows", "mistral")
    return {name: inspect_checkpoint(folder) for name, folder in made.items()}


@pytest.mark.parametrize(
    "name, config, wanted",
    [
        ("dense", {}, None),
        ("dense", {"name": "dense"}, None),
        ("dense", {"name": "cca"}, CCASpec(16, 1024)),
        ("dense", {"name": "cca", "group_size": 4, "window": 4}, CCASpec(4, 4)),
        ("cca", {}, CCASpec(8, 32, "mean", "query")),
        ("cca", {"window": 64}, CCASpec(8, 64, "mean", "query")),
        ("cca", {"name": "cca", "group_size": 32}, CCASpec(32, 32, "mean", "query")),
        ("cca", {"name": "dense"}, None),
    ],
)
def test_methods(specs, name, config, wanted):
    assert choose_method(AttentionConfig(**config), specs[name]) == wanted


@pytest.mark.parametrize(
    "name, config, match",
    [
        ("dense", {"window": 64}, r"attention\.window=64 is not allowed with dense"),
        ("cca", {"name": "dense", "group_size": 8}, r"attention\.group_size=8 is not allowed with dense"),
        ("cca", {"group_size": 33}, r"attention\.window=32 is not allowed with attention\.group_size=33"),
        ("windows", {"name": "cca"}, "sliding windows"),
        ("dynamic", {"name": "cca"}, "RoPE of type dynamic"),
        ("cca", {"name": "landmark"}, "trained with cca"),
    ],
)
def test_refusals(specs, name, config, match):
    with pytest.raises(ConfigError, match=match):
        choose_method(AttentionConfig(**config), specs[name])


@pytest.mark.parametrize("name, method", [("dense", CCASpec(4, 4)), ("cca", None)])
def test_another_method_than_in_training_is_told(specs, name, method, caplog):
    with caplog.at_level(logging.WARNING):
        warn_untrained(specs[name].attention, specs[name])
        assert not caplog.records
        warn_untrained(method, specs[name])
    assert "was trained with" in caplog.text


@pytest.mark.parametrize("sizes", [CoreSizes(1, 1), CoreSizes(5, 9), CoreSizes(16, 64), CoreSizes(64, 64)])
@pytest.mark.parametrize("chunk_size", [16, 48])
def test_pages_that_are_counted_suffice_and_are_needed(sizes, chunk_size):
    """By the formulas, a token at a time: what a sequence holds while it grows by chunks, then by tokens."""
    size, num_tokens = 16, 300
    capacity = CoreCapacity(size, chunk_size)
    group_size, window = sizes.group_size, sizes.window

    def pages(first, stop):
        return -(-stop // size) - first // size

    most = 0
    for start in range(0, num_tokens, chunk_size):
        stop = min(num_tokens, start + chunk_size)
        first = max(0, (start + 1 - window) // group_size) * group_size
        assert first == sizes.first_token(start)
        most = max(most, pages(first, stop))
    assert most <= capacity.count_token_pages(sizes, num_tokens) <= most + 1
    for position in range(num_tokens):
        assert pages(sizes.first_token(position), position + 1) <= capacity.count_token_pages(sizes, num_tokens)
    total = -(-(num_tokens // group_size) // size) + capacity.count_token_pages(sizes, num_tokens)
    assert capacity.count_pages(sizes, num_tokens) == total
    longest = capacity.count_tokens(sizes, total, at_most=10_000)
    assert longest >= num_tokens
    assert capacity.count_pages(sizes, longest) <= total < capacity.count_pages(sizes, longest + 1)
