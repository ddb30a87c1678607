"""What one serving process needs of its memory, and how fast it can be at most, without loading a model. No torch here.

The processor's limit is its matrix products while a prompt is computed, and its memory while tokens are generated: each
token reads every weight, for all sequences of a batch at once, and the KV of its own sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from longctx.engine.config import EngineConfig
from longctx.models.checkpoint import ModelSpec
from parallel.option import parse_budget

PARTS = ("runtime", "weights", "kv", "activations", "logits")
ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
RUNTIME_BYTES = {"cpu": 420 * 2**20, "cuda": 900 * 2**20}  # of a process that has loaded everything but a model
KV_SHARES = {"cpu": 0.3, "cuda": 0.8}  # engine.kv_bytes=auto: of what is available, or free after the weights
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """Bytes of one process, and the tokens whose KV a worker of some ranks holds."""

    parts: Mapping[str, int]  # by the names of PARTS
    num_tokens: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def plan_serving_memory(
    spec: ModelSpec,
    engine: EngineConfig,
    *,
    dtype: str,
    device_type: str,
    memory_bytes: int,
    max_context: int,
    sp_degree: int,
) -> ServingPlan:
    """The memory of one rank of a worker.

    Args:
        spec, engine: the model and its engine.
        dtype: of weights and KV.
        device_type: ``cpu`` or ``cuda``.
        memory_bytes: of the process, for ``engine.kv_bytes=auto``.
        max_context: tokens of one sequence at most.
        sp_degree: ranks of the worker.
    """
    element = ELEMENT_SIZES[dtype]
    weights = spec.num_parameters * element
    runtime = RUNTIME_BYTES[device_type]
    per_token = count_token_bytes(spec, dtype)
    budget = parse_budget(engine.kv_bytes)
    if budget is None:
        share = KV_SHARES[device_type]
        free = memory_bytes if device_type == "cpu" else memory_bytes - runtime - weights
        wanted = -(-engine.max_sequences * max_context // sp_degree) * per_token
        budget = max(0, min(int(share * free), wanted))
    num_tokens = budget // per_token
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    widest = max(3 * spec.intermediate_size, 2 * q_size + 2 * kv_size) + 3 * spec.hidden_size
    parts = {
        "runtime": runtime,
        "weights": weights,
        "kv": num_tokens * per_token,
        "activations": engine.max_batch_tokens * widest * element,
        "logits": engine.max_sequences * spec.vocab_size * _FLOAT,
    }
    return ServingPlan(parts, num_tokens * sp_degree)


def count_token_bytes(spec: ModelSpec, dtype: str) -> int:
    """KV of one token, all layers."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * ELEMENT_SIZES[dtype]


def prefill_flops(spec: ModelSpec, num_tokens: int, num_weights: int) -> int:
    """Of a prompt's forward; its last token's output alone."""
    pairs = num_tokens * (num_tokens + 1) // 2
    head = spec.vocab_size * spec.hidden_size
    linear = 2 * (num_tokens * (num_weights - head) + head)
    return linear + 4 * pairs * spec.num_layers * spec.num_heads * spec.head_dim
