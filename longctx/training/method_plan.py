"""What landmark and CCA attention see, compute and hold, for plans and for a step's share of the peak. No torch here.

Legend of counts: a score is an entry that queries meet keys for, a value one whose value is read; each costs one
product in the forward and two in the backward.
"""

from collections.abc import Sequence
from itertools import pairwise

from longctx.models.checkpoint import ModelSpec
from longctx.training.config import TrainAttentionConfig, TrainConfig

TILE_ROWS, TILE_SCORES = 128, 1 << 24  # of longctx/attention/landmark_products.py and longctx/training/core_merge.py
_LANDMARK_TILES, _CORE_TILES = 6, 5  # tensors of a tile's scores that exist at one time in a backward, at most
_PRODUCTS = 1 + 2  # forward and backward, of a score or a value
_FLOAT = 4


def count_method_flops(spec: ModelSpec, cu_seqlens: Sequence[int], attention: TrainAttentionConfig) -> int:
    """Of one layer's attention, forward and backward, over packed documents; ``attention`` is settled and one of the
    two."""
    count = _count_landmark if attention.name == "landmark" else _count_cca
    return sum(count(spec, stop - start, attention) for start, stop in pairwise(cu_seqlens))


def count_core_flops(spec: ModelSpec, length: int, attention: TrainAttentionConfig) -> int:
    """Of CCA's cores alone: what is not attention within the window."""
    assert attention.group_size and attention.window
    seen = 2 * spec.num_heads * _sum_cores(length, attention.window, attention.group_size)
    num_grouped = max(0, length - attention.window) // attention.group_size * attention.group_size
    pooling_heads = spec.num_heads if attention.head_pooling == "weights" else spec.num_kv_heads
    pooled = num_grouped * (pooling_heads + 2 * spec.num_kv_heads)
    return (seen + pooled) * _PRODUCTS * 2 * spec.head_dim


def count_method_memory(spec: ModelSpec, config: TrainConfig, num_local: int, *, device_type: str) -> int:
    """Bytes that one layer's attention holds on a rank beside what its exchange plan does.

    Args:
        spec: the model.
        config: settled.
        num_local: this rank's tokens.
        device_type: ``cpu`` or ``cuda``.
    """
    attention, length = config.attention, config.train.context_length
    kv = 2 * spec.num_kv_heads * spec.head_dim * _FLOAT  # of a token, in float32
    is_alone_on_gpu = device_type == "cuda" and config.parallel.sp_degree == 1  # Triton: no scores
    if attention.name == "landmark":
        assert attention.block_size
        whole = 3 * length * kv  # K and V, their gradients, and those in the order of tokens
        if is_alone_on_gpu:  # K and V in padded blocks, and their gradients
            size = max(16, 1 << attention.block_size.bit_length())
            return 2 * length * size // (attention.block_size + 1) * kv
        return whole + _LANDMARK_TILES * _FLOAT * min(TILE_SCORES, min(TILE_ROWS, num_local) * length * spec.num_heads)
    if attention.name == "cca":
        assert attention.group_size
        num_cores = length // attention.group_size
        cores = 4 * num_cores * kv  # and their gradients, rounded and not
        pooling = num_local * (2 * spec.num_heads * spec.head_dim * _FLOAT + 2 * kv)  # a token's query, K, V; gradients
        tile = 0 if is_alone_on_gpu else min(TILE_SCORES, min(TILE_ROWS, num_local) * num_cores * spec.num_heads)
        return cores + pooling + _CORE_TILES * _FLOAT * tile
    return 0


def _count_landmark(spec: ModelSpec, length: int, attention: TrainAttentionConfig) -> int:
    assert attention.block_size
    tokens = attention.block_size  # of a block
    size = tokens + 1
    num_blocks, rest = divmod(length, size)
    own = num_blocks * (tokens * (tokens + 1) // 2 + tokens) + rest * (rest + 1) // 2  # a landmark sees its block
    earlier = size * (num_blocks * (num_blocks - 1) // 2) + rest * num_blocks  # blocks, over all queries
    scores, values = own + earlier * size, own + earlier * tokens
    return spec.num_heads * (scores + values) * _PRODUCTS * 2 * spec.head_dim


def _count_cca(spec: ModelSpec, length: int, attention: TrainAttentionConfig) -> int:
    assert attention.group_size and attention.window
    hidden = attention.group_size * _sum_cores(length, attention.window, attention.group_size)
    near = 2 * spec.num_heads * (length * (length + 1) // 2 - hidden)
    return near * _PRODUCTS * 2 * spec.head_dim + count_core_flops(spec, length, attention)


def _sum_cores(length: int, window: int, group_size: int) -> int:
    """Cores that the queries of a document see, added up."""
    if length < window:
        return 0
    whole, rest = divmod(length - window, group_size)
    return group_size * (whole * (whole - 1) // 2) + whole * (rest + 1)
