"""How long a training step takes, from what its products, its attention and its messages take. No torch here.

Matrix products run at a rank's peak; what lies between them, and the optimizer, at the speed of its memory; attention
and its exchange as ``parallel/prediction.py`` plays them through. What ZeRO sends hides behind the backward on a GPU
only: gloo on a CPU works on the cores that compute.
"""

from collections import Counter
from dataclasses import dataclass, replace

from longctx.models.checkpoint import ModelSpec
from longctx.training.activation_memory import Tokens
from longctx.training.config import SF_GROUP_SIZE, TrainConfig
from longctx.training.flops import count_linear_weights, count_training_flops
from longctx.training.memory_plan import ELEMENT_SIZES
from longctx.training.method_plan import count_core_flops
from longctx.training.model_sizes import count_sizes
from longctx.training.preflight import read_links
from parallel.links import LinkModel
from parallel.mask import Mask
from parallel.plan import Plan, make_problem
from parallel.planner import make_plan
from parallel.prediction import predict

ATTENTION_SHARE = 0.5  # of the peak that attention reaches, where no links_file says what was measured
_PASSES, _PASSES_AGAIN = 4, 2  # times that what a layer saves is read or written in a step, and when computed again
_OPTIMIZER_BYTES = 32  # that AdamW reads and writes for a weight: gradient, master, moments, temporaries
_BACKWARD_SHARE = 2 / 3  # of a step's products


@dataclass(frozen=True, slots=True)
class TimePlan:
    """Seconds of one step."""

    products: float
    attention: float  # of the rank that attends longest
    elementwise: float  # whatever moves activations through memory
    optimizer: float
    exchange: float  # of attention, in which a rank does not compute
    sharding: float  # of gradients and weights under ZeRO, likewise
    num_tokens: int  # of a step, all ranks
    flops: int  # of a step by the model's mathematics, all ranks

    @property
    def total(self) -> float:
        """Of the step."""
        return self.products + self.attention + self.elementwise + self.optimizer + self.exchange + self.sharding

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks."""
        return self.num_tokens / self.total

    @property
    def communication_share(self) -> float:
        """Of the step, in which ranks wait for bytes."""
        return (self.exchange + self.sharding) / self.total


def choose_links(config: TrainConfig, links: LinkModel, peak_flops: float) -> LinkModel:
    """What ``parallel.links_file`` says, else ``links`` with attention at its share of the peak."""
    given = read_links(config.parallel)
    return given or replace(links, flops_per_s=ATTENTION_SHARE * peak_flops)


def plan_attention(
    spec: ModelSpec, config: TrainConfig, links: LinkModel, *, window: int | None = None, num_nodes: int = 1
) -> Plan:
    """The exchange plan of a sequence of ``train.context_length`` tokens that is one document.

    Raises ``ValueError`` if ``parallel.plan`` cannot do it.
    """
    parallel, attention, length = config.parallel, config.attention, config.train.context_length
    groups, window_group, name = None, 1, parallel.plan
    if attention.name == "sf":
        groups = (*range(0, length, attention.group_size or SF_GROUP_SIZE), length)
    elif attention.name == "cca":
        window, window_group = attention.window, attention.group_size or 1
    elif attention.name == "landmark":
        name = "all_gather"
    problem = make_problem(
        Mask(True, window, groups, window_group),
        length,
        length,
        (spec.num_heads, spec.num_kv_heads, spec.head_dim),
        world_size=parallel.sp_degree,
        layout=parallel.layout,
        element_size=ELEMENT_SIZES[config.model.dtype],
        num_nodes=max(1, min(num_nodes, parallel.sp_degree)),
    )
    keeps_results = config.train.activation_checkpointing and config.train.keep_attention
    may_keep = not keeps_results and attention.name != "landmark"
    return make_plan(name, problem, links, backward=True, may_keep=may_keep)


def plan_time(
    spec: ModelSpec,
    config: TrainConfig,
    links: LinkModel,
    *,
    peak_flops: float,
    bytes_per_s: float,
    device_type: str,
    num_nodes: int = 1,
) -> TimePlan:
    """The time of one step.

    Args:
        spec, config: the run's.
        links: between the ranks of a sequence group, and their attention's speed.
        peak_flops: matrix products of one rank a second.
        bytes_per_s: that one rank reads and writes.
        device_type: ``cpu`` or ``cuda``.
        num_nodes: that the ranks are spread over.
    """
    parallel, train, length = config.parallel, config.train, config.train.context_length
    num_sequences = train.batch_size // parallel.dp_degree  # of one rank, a step
    num_local = -(-length // parallel.sp_degree)
    sizes = count_sizes(spec, config.peft)
    trains_base = config.peft.method == "none"
    passes = (3 if trains_base else 2) + (1 if train.activation_checkpointing else 0)
    weights = count_linear_weights(spec)
    head = spec.vocab_size * spec.hidden_size  # is not computed again
    operations = 2 * passes * weights - (2 * head if train.activation_checkpointing else 0)
    products = num_sequences * num_local * (operations + 6 * sizes.num_adapter_weights) / peak_flops
    attention = exchange = 0.0
    for window, num_layers in Counter(spec.sliding_windows).items():
        plan = plan_attention(spec, config, links, window=window, num_nodes=num_nodes)
        again = train.activation_checkpointing and not train.keep_attention
        for prediction in (*[predict(plan, links)] * (2 if again else 1), predict(plan, links, backward=True)):
            attention += num_sequences * num_layers * prediction.compute_s
            exchange += num_sequences * num_layers * prediction.exposed_s
    if config.attention.name == "cca":
        cores = spec.num_layers * count_core_flops(spec, length, config.attention) / parallel.sp_degree
        attention += num_sequences * cores / links.flops_per_s
    tokens = Tokens(spec, config, num_local, ELEMENT_SIZES[config.model.dtype])
    saved = spec.num_layers * (tokens.attention_saved + tokens.mlp_saved)
    moved = saved * (_PASSES + (_PASSES_AGAIN if train.activation_checkpointing else 0))
    world_size = parallel.dp_degree * parallel.sp_degree
    stepped = sizes.num_trained // (world_size if config.deepspeed.zero_stage else 1)
    sharding = _shard_bytes(config, num_sequences, sizes.num_weights, sizes.num_trained) / _bandwidth(links, num_nodes)
    hidden = _BACKWARD_SHARE * (products + attention) if device_type == "cuda" else 0.0
    return TimePlan(
        products=products,
        attention=attention,
        elementwise=num_sequences * moved / bytes_per_s,
        optimizer=stepped * _OPTIMIZER_BYTES / bytes_per_s,
        exchange=exchange,
        sharding=max(0.0, sharding - hidden),
        num_tokens=train.batch_size * length,
        flops=train.batch_size
        * count_training_flops(
            spec,
            (0, length),
            attention=config.attention,
            trains_base=trains_base,
            num_adapter_weights=sizes.num_adapter_weights,
        ),
    )


def _bandwidth(links: LinkModel, num_nodes: int) -> float:
    return links.node_bytes_per_s or links.bytes_per_s if num_nodes > 1 else links.bytes_per_s


def _shard_bytes(config: TrainConfig, num_passes: int, num_weights: int, num_trained: int) -> float:
    """What a rank sends in a step beside attention, by rings over all ranks."""
    world_size, stage = config.parallel.dp_degree * config.parallel.sp_degree, config.deepspeed.zero_stage
    element = ELEMENT_SIZES[config.model.dtype]
    around = (world_size - 1) / world_size
    gradients = num_trained * element * (1 if stage >= 2 else 2)
    if stage == 3:
        return around * (gradients + 2 * num_passes * num_weights * element)
    return around * (gradients + (num_trained * element if stage else 0))
