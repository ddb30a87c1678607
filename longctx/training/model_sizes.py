"""How many elements the tensors of a training run have, from the model's specification alone. No torch here."""

from dataclasses import dataclass

from longctx.adapters.config import PeftConfig
from longctx.models.checkpoint import ModelSpec, weight_shapes
from longctx.models.families import FAMILIES


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Elements; over all layers but where it says so."""

    num_weights: int  # of the base model
    num_adapter_weights: int
    num_trained: int  # of both
    layer_weights: int  # of one layer of the base model
    embedding: int  # of one matrix of the vocabulary's size
    largest_trained: int  # of one tensor
    largest_group: int  # of those trained weights that decay, or of the others

    @property
    def num_frozen(self) -> int:
        """What is not trained."""
        return self.num_weights + self.num_adapter_weights - self.num_trained


def count_sizes(spec: ModelSpec, peft: PeftConfig) -> ModelSizes:
    """Of a model and what is trained of it."""
    linears = list_linears(spec)
    embedding = spec.vocab_size * spec.hidden_size
    num_matrices = 1 if spec.tie_word_embeddings else 2
    layer_weights = (spec.num_parameters - num_matrices * embedding - spec.hidden_size) // spec.num_layers
    adapters = [_adapter_weights(peft, *shape) for name, shape in linears.items() if is_target(peft, name)]
    if peft.method in ("series", "parallel"):
        num_sublayers = 2 if peft.sublayers == "both" else 1
        adapters = [2 * spec.hidden_size * peft.bottleneck_size] * num_sublayers
    num_adapter_weights = spec.num_layers * sum(adapters) if peft.method != "none" else 0
    if peft.method == "none":
        trained, largest = spec.num_parameters, max(embedding, *(rows * columns for rows, columns in linears.values()))
    else:
        norms = _norm_weights(spec) if peft.train_norms else 0
        trained = num_adapter_weights + norms + (embedding if peft.train_embeddings else 0)
        largest = embedding if peft.train_embeddings else max(adapters, default=0)
    has_embedding = peft.method == "none" or peft.train_embeddings
    others = embedding if has_embedding else 0
    group = max(trained - others, others)
    return ModelSizes(spec.num_parameters, num_adapter_weights, trained, layer_weights, embedding, largest, group)


def list_linears(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Linear layers of one decoder layer: (inputs, outputs) by name."""
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    hidden, inner = spec.hidden_size, spec.intermediate_size
    if FAMILIES[spec.family].fused:
        first = {"qkv_proj": (hidden, q_size + 2 * kv_size), "gate_up_proj": (hidden, 2 * inner)}
    else:
        first = {
            "q_proj": (hidden, q_size),
            "k_proj": (hidden, kv_size),
            "v_proj": (hidden, kv_size),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
        }
    return first | {"o_proj": (q_size, hidden), "down_proj": (inner, hidden)}


def is_target(peft: PeftConfig, name: str) -> bool:
    """Whether the linear layer ``name`` gets LoRA or DoRA."""
    return name in peft.target_modules or "all-linear" in peft.target_modules


def _norm_weights(spec: ModelSpec) -> int:
    """Norms have one dimension, as nothing else has that ``weight_shapes`` lists."""
    return sum(shape[0] for shape in weight_shapes(spec).values() if len(shape) == 1)


def _adapter_weights(peft: PeftConfig, num_inputs: int, num_outputs: int) -> int:
    """Of LoRA's two matrices, and DoRA's magnitudes."""
    return peft.rank * (num_inputs + num_outputs) + (num_outputs if peft.method == "dora" else 0)
