"""Floating-point operations that training needs by the model's mathematics, whatever a rank does to save memory.

A product of an ``[m, k]`` and a ``[k, n]`` matrix is ``2 m k n``. A linear layer costs three such products a step: the
output, its input's gradient and its weights' gradient, which frozen weights do not have. Attention costs two products
over the unmasked entries in the forward and four in the backward. What is computed again counts nothing, nor do norms,
activation functions and the optimizer (PaLM, Chowdhery et al. 2022, appendix B). No torch here.
"""

from collections.abc import Sequence
from itertools import pairwise

from longctx.models.checkpoint import ModelSpec
from longctx.training.config import SF_GROUP_SIZE, TrainAttentionConfig
from longctx.training.method_plan import count_method_flops
from longctx.training.shifted_groups import cut_groups, split_heads

_OUTPUT, _INPUT_GRADIENT, _WEIGHT_GRADIENT = 2, 2, 2  # operations per weight and token
_ATTENTION_PRODUCTS = 2 + 4  # over unmasked entries, forward and backward


def count_training_flops(
    spec: ModelSpec,
    cu_seqlens: Sequence[int],
    *,
    attention: TrainAttentionConfig | None = None,
    trains_base: bool = True,
    num_adapter_weights: int = 0,
) -> int:
    """Of forward and backward of one sequence.

    Args:
        spec: the model.
        cu_seqlens: ``[num_documents + 1]`` boundaries; nothing is seen across documents.
        attention: that is trained, settled; None: dense.
        trains_base: whether the model's own weights are trained, and not only an adapter.
        num_adapter_weights: of the adapters' matrices, all layers.
    """
    frozen = _OUTPUT + _INPUT_GRADIENT
    trained = frozen + _WEIGHT_GRADIENT
    linear = count_linear_weights(spec) * (trained if trains_base else frozen) + num_adapter_weights * trained
    if attention is not None and attention.name in ("landmark", "cca"):
        products = spec.num_layers * count_method_flops(spec, cu_seqlens, attention)
    else:
        if attention is not None and attention.name == "sf":
            areas = spec.num_layers * _count_sf_area(spec, cu_seqlens, attention)
        else:
            areas = spec.num_heads * sum(count_area(cu_seqlens, window) for window in spec.sliding_windows)
        products = areas * _ATTENTION_PRODUCTS * 2 * spec.head_dim
    return (cu_seqlens[-1] - cu_seqlens[0]) * linear + products


def count_linear_weights(spec: ModelSpec) -> int:
    """Weights that multiply every token: linear layers and the output head, without biases and norms."""
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = spec.hidden_size * (2 * q_size + 2 * kv_size + 3 * spec.intermediate_size)
    return spec.num_layers * layer + spec.vocab_size * spec.hidden_size


def count_area(cu_seqlens: Sequence[int], window: int | None = None) -> int:
    """Pairs of a query and a key that it sees: its own document's, up to itself, within ``window``."""
    return sum(_document_area(stop - start, window) for start, stop in pairwise(cu_seqlens))


def _count_sf_area(spec: ModelSpec, cu_seqlens: Sequence[int], attention: TrainAttentionConfig) -> int:
    """Over one layer's heads: groups of a document's tokens, and behind the first of them the sinks."""
    area, group_size = 0, attention.group_size or SF_GROUP_SIZE
    for heads in split_heads(group_size, attention.returned_heads, spec.num_heads, spec.num_kv_heads):
        groups = count_area(cut_groups(cu_seqlens, heads.first_size, group_size))
        later = sum(max(0, stop - start - heads.first_size) for start, stop in pairwise(cu_seqlens))
        area += (heads.queries.stop - heads.queries.start) * (groups + later * attention.sink_tokens)
    return area


def _document_area(length: int, window: int | None) -> int:
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen
