"""Long-context language models on Ray: serving, sequence parallelism, memory attention, fine-tuning.

Importing this package loads neither torch nor ray; the names below load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longctx.attention.cca import cca_attention
    from longctx.attention.landmark import landmark_attention
    from longctx.llm import LLM
    from longctx.messages import AttentionOptions, SamplingParams
    from parallel.attention import sequence_parallel_attention, token_ring_attention
    from parallel.shard import shard_sequence, unshard_sequence

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AttentionOptions",
    "SamplingParams",
    "__version__",
    "cca_attention",
    "landmark_attention",
    "sequence_parallel_attention",
    "shard_sequence",
    "token_ring_attention",
    "unshard_sequence",
]

_LAZY = {
    "AttentionOptions": "longctx.messages",
    "cca_attention": "longctx.attention.cca",
    "landmark_attention": "longctx.attention.landmark",
    "LLM": "longctx.llm",
    "SamplingParams": "longctx.messages",
    "sequence_parallel_attention": "parallel.attention",
    "shard_sequence": "parallel.shard",
    "token_ring_attention": "parallel.attention",
    "unshard_sequence": "parallel.shard",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
