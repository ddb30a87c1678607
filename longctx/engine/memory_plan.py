"""What one serving process needs of its memory, and how fast it can be at most, without loading a model. No torch here.

The processor's limit is its matrix products while a prompt is computed, and its memory while tokens are generated: each
token reads every weight, for all sequences of a batch at once, and the KV of its own sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from longctx.attention.config import BELOW_CONTEXTS, BELOW_SHARE, AttentionConfig
from longctx.engine.config import KV_SHARES, EngineConfig
from longctx.engine.context_plan import Contexts
from longctx.models.checkpoint import ModelSpec
from parallel.option import parse_budget

PARTS = ("runtime", "weights", "kv", "landmarks", "blocks", "activations", "logits")
ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
RUNTIME_BYTES = {"cpu": 420 * 2**20, "cuda": 900 * 2**20}  # of a process that has loaded everything but a model
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """Bytes of one process."""

    parts: Mapping[str, int]  # by the names of PARTS
    room: Mapping[str, int]  # for contexts: kv and blocks, wherever they are
    apart_bytes: int  # not in the memory that is planned: in a mapped file, or in host memory beside a GPU's

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def plan_serving_memory(
    spec: ModelSpec,
    engine: EngineConfig,
    attention: AttentionConfig,
    contexts: Contexts,
    *,
    dtype: str,
    device_type: str,
    memory_bytes: int,
    max_context: int,
) -> ServingPlan:
    """The memory of one rank of a worker.

    Args:
        spec, engine, attention: the model and its engine.
        contexts: what sequences cost.
        dtype: of weights and KV.
        device_type: ``cpu`` or ``cuda``.
        memory_bytes: of the process, for budgets that are ``auto``.
        max_context: tokens of one sequence at most.
    """
    element = ELEMENT_SIZES[dtype]
    weights = spec.num_parameters * element
    runtime = RUNTIME_BYTES[device_type]
    needed = contexts.count_bytes(max_context)
    free = memory_bytes if device_type == "cpu" else memory_bytes - runtime - weights
    page_bytes = contexts.layout.page_bytes
    near = parse_budget(engine.kv_bytes)
    if near is None:
        most = engine.max_sequences * needed.get("kv", needed.get("blocks", 0))
        near = max(0, min(int(KV_SHARES[device_type] * free), most))
    room = {"kv": near // page_bytes * page_bytes}
    if "blocks" in needed:
        below = parse_budget(attention.blocks_bytes)
        if below is None:
            below = BELOW_CONTEXTS * needed["blocks"]
            if attention.below == "host":
                below = min(int(BELOW_SHARE * memory_bytes), below)
        room["blocks"] = below // page_bytes * page_bytes
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    widest = max(3 * spec.intermediate_size, 2 * q_size + 2 * kv_size) + 3 * spec.hidden_size
    is_counted = attention.below == "host" and device_type == "cpu"  # what is below is in a process's own memory
    parts = {
        "runtime": runtime,
        "weights": weights,
        "kv": room["kv"],
        "landmarks": needed.get("landmarks", 0) * room.get("blocks", 0) // max(1, needed.get("blocks", 1)),
        "blocks": room.get("blocks", 0) if is_counted else 0,
        "activations": engine.max_batch_tokens * widest * element,
        "logits": engine.max_sequences * spec.vocab_size * _FLOAT,
    }
    return ServingPlan(parts, room, 0 if is_counted else room.get("blocks", 0))


def prefill_flops(spec: ModelSpec, contexts: Contexts, num_tokens: int, num_weights: int) -> float:
    """Of a prompt's forward; its last token's output alone."""
    head = spec.vocab_size * spec.hidden_size
    return 2 * (num_tokens * (num_weights - head) + head) + contexts.count_flops(num_tokens)
