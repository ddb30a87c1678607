"""What a training run needs of a rank's memory, by part, without running it. No torch here.

A step has four moments at which a rank may be fullest: the loss, whose logits and gradients come on top of what all
layers keep; the backward of the last layer, when all layers' activations are kept; the backward's end, when all
gradients are there; and the optimizer's step. What DeepSpeed holds at each depends on the ZeRO stage and the dtype,
which pick one of its optimizers; the counts below were read from what these allocate (DeepSpeed 0.19).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from longctx.models.checkpoint import ModelSpec
from longctx.training.activation_memory import LayerMemory, count_layer
from longctx.training.config import TrainConfig
from longctx.training.model_sizes import ModelSizes, count_sizes
from parallel.option import parse_size
from parallel.plan import Plan

PARTS = ("runtime", "weights", "gradients", "optimizer", "activations", "attention", "loss", "buffers")
ELEMENT_SIZES = {"float32": 4, "bfloat16": 2}
RUNTIME_BYTES = {"cpu": 310 * 2**20, "cuda": 1100 * 2**20}  # of a rank that has imported everything and trains nothing
LIVE_ELEMENTS = 10**9  # of weights that ZeRO 3 keeps gathered
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one rank at its fullest moment."""

    moment: str
    parts: Mapping[str, int]  # by the names of PARTS
    host_bytes: int  # of what is offloaded to the host, where the rank computes on a GPU

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def plan_memory(spec: ModelSpec, config: TrainConfig, plan: Plan, *, device_type: str) -> MemoryPlan:
    """The memory of the fullest rank.

    Args:
        spec: the model.
        config: the run; its sequences are ``train.context_length`` long.
        plan: of the attention of one sequence.
        device_type: ``cpu`` or ``cuda``.
    """
    ranks = range(config.parallel.sp_degree)
    layers = [count_layer(spec, config, plan, rank=rank, device_type=device_type) for rank in ranks]
    moments = [
        moment
        for rank, layer in enumerate(layers)
        for moment in _Rank(spec, config, device_type, layer, plan.problem.num_q[rank]).moments()
    ]
    name, parts = max(moments, key=lambda moment: sum(moment[1].values()))
    return MemoryPlan(name, parts, _count_host(spec, config, layers, device_type))


class _Rank:
    """One rank's parts at each moment."""

    def __init__(self, spec: ModelSpec, config: TrainConfig, device_type: str, layer: LayerMemory, num: int) -> None:
        self.spec, self.config, self.layer, self.num = spec, config, layer, num
        self.sizes = count_sizes(spec, config.peft)
        self.element = ELEMENT_SIZES[config.model.dtype]
        self.states = ShardedStates(config, self.sizes, device_type)
        self.runtime = RUNTIME_BYTES[device_type]

    def moments(self) -> list[tuple[str, dict[str, int]]]:
        """Name and parts of each."""
        spec, layer, states = self.spec, self.layer, self.states
        kept = spec.num_layers * layer.kept
        hidden = self.num * spec.hidden_size * self.element
        head, every = self._head_weights, self.sizes.num_trained
        early, late = states.gradients(head), states.gradients(every)
        return [
            ("loss", self._parts(kept + self._last_norm, 0, self._loss, states.gradients(0), states.buffers(0))),
            ("forward", self._parts(kept + layer.forward + hidden, layer.exchange, 0, states.gradients(0), 0)),
            ("backward", self._parts(kept + layer.live + hidden, layer.exchange, 0, early, states.buffers(head))),
            ("first layer", self._parts(layer.kept + layer.live, layer.exchange, 0, late, states.buffers(every))),
            ("reduction", self._parts(0, 0, 0, late, states.reduction_buffers + self._embedding_gradient)),
            ("step", self._parts(0, 0, 0, states.step_gradients, states.step_buffers)),
        ]

    def _parts(self, activations: int, attention: int, loss: int, gradients: int, buffers: int) -> dict[str, int]:
        values = (self.runtime, self.states.weights, gradients, self.states.optimizer, activations, attention, loss)
        return dict(zip(PARTS, (*values, buffers), strict=True))

    @property
    def _trains_head(self) -> bool:
        return self.config.peft.method == "none" or (
            self.config.peft.train_embeddings and self.spec.tie_word_embeddings
        )

    @property
    def _head_weights(self) -> int:
        return self.sizes.embedding if self._trains_head else 0

    @property
    def _embedding_gradient(self) -> int:
        """The embedding's own part, before it is added to the head's."""
        return self.sizes.embedding * self.element if self._trains_head and self.spec.tie_word_embeddings else 0

    @property
    def _last_norm(self) -> int:
        hidden = self.num * self.spec.hidden_size
        return hidden * (3 * self.element if self.element == _FLOAT else 3 * self.element + _FLOAT)

    @property
    def _loss(self) -> int:
        """Logits of a tile, in float32 and rounded; the head's gradient, and in half precision a tile's part of it."""
        tile = min(self.num, self.config.train.loss_tile or self.num)
        is_half = self.element != _FLOAT
        logits = tile * self.spec.vocab_size * (_FLOAT + (self.element if is_half else 0))
        gradient = self._head_weights * (_FLOAT + (self.element + _FLOAT if is_half else 0))
        return logits + gradient + 2 * self.num * self.spec.hidden_size * self.element


class ShardedStates:
    """Weights, gradients and optimizer states on one rank, as DeepSpeed holds them.

    Args:
        config: stage, offload, buckets, dtype and degrees.
        sizes: of the model.
        device_type: where a buffer that is never filled costs nothing, it does not count.
    """

    def __init__(self, config: TrainConfig, sizes: ModelSizes, device_type: str) -> None:
        self.stage, self.sizes = config.deepspeed.zero_stage, sizes
        self.element = ELEMENT_SIZES[config.model.dtype]
        self.is_half = self.element != _FLOAT
        self.world_size = config.parallel.dp_degree * config.parallel.sp_degree
        self.share = 1 if self.stage == 0 else self.world_size
        self.is_offloaded = config.deepspeed.offload_optimizer and device_type == "cuda"
        self.holds_params = not (config.deepspeed.offload_params and device_type == "cuda")
        bucket = parse_size(config.deepspeed.bucket_size)
        own = sizes.num_trained * self.element
        self.reserves_buckets = device_type == "cuda"  # a CPU's memory is taken when it is written
        self.bucket = bucket * 2 if self.reserves_buckets else min(bucket, own)

    @property
    def weights(self) -> int:
        """Of the base and the adapters; under ZeRO 3 this rank's, what other ranks' stay gathered, and one copy that
        cutting them up leaves behind."""
        sizes = self.sizes
        num = sizes.num_weights + sizes.num_adapter_weights
        if self.stage < 3:
            return num * self.element
        own = num // self.world_size if self.holds_params else 0
        gathered = min(num, LIVE_ELEMENTS) if self.world_size > 1 else 0
        return (own + gathered + sizes.largest_trained // self.world_size) * self.element

    @property
    def optimizer(self) -> int:
        """Two moments, and a float32 copy of the weights but where the weights are that themselves."""
        if self.is_offloaded:
            return 0
        has_master = self.stage > 0 or self.is_half
        return self.sizes.num_trained // self.share * _FLOAT * (3 if has_master else 2)

    def gradients(self, num_done: int) -> int:
        """During a backward that has come to the gradients of ``num_done`` weights."""
        if self.stage == 1 and self.is_half:  # float32 sums of all, and what the backward makes
            return self.sizes.num_trained * _FLOAT + num_done * self.element
        if self.stage < 2:
            return num_done * self.element
        return self._owned if self.stage == 3 else 0

    def buffers(self, num_done: int) -> int:
        """Of gradients on their way to the rank that sums them."""
        if self.stage < 2:
            return 0
        return self.bucket if self.reserves_buckets else min(self.bucket, num_done * self.element)

    @property
    def reduction_buffers(self) -> int:
        """While the last gradients are added up over the ranks."""
        num_trained = self.sizes.num_trained
        if self.stage == 0:
            return num_trained * self.element
        if self.stage == 1:
            return num_trained * (_FLOAT + self.element) if self.is_half else self._owned
        if self.stage == 2:
            copies = 2 if self.world_size == 1 else 1
            return copies * self.bucket + self._owned + (self.sizes.largest_trained * _FLOAT if self.is_half else 0)
        return 2 * self.bucket + self._owned

    @property
    def step_gradients(self) -> int:
        """While the optimizer steps the larger group of weights: gradients, and that group's in one tensor."""
        num_trained = self.sizes.num_trained
        if self.stage == 0:
            return num_trained * (self.element + (_FLOAT if self.is_half else 0))
        if self.stage == 1 and self.is_half:
            return num_trained * (_FLOAT + self.element)
        return self._owned + (0 if self.stage == 2 and self.is_half else self._group)

    @property
    def step_buffers(self) -> int:
        """Two temporary tensors of AdamW as large as what it steps at once."""
        if self.is_offloaded:
            return 0
        stepped = self.sizes.largest_trained * _FLOAT if self.stage == 0 else self._group
        return 2 * stepped + (self.bucket if self.stage == 3 else 0)

    @property
    def _owned(self) -> int:
        """A rank's gradients in float32."""
        return self.sizes.num_trained // self.world_size * _FLOAT

    @property
    def _group(self) -> int:
        """A rank's part of the larger group of weights, in float32."""
        return self.sizes.largest_group // self.world_size * _FLOAT


def _count_host(spec: ModelSpec, config: TrainConfig, layers: list[LayerMemory], device_type: str) -> int:
    """What one rank puts into the host's memory."""
    if device_type != "cuda":
        return 0
    sizes = count_sizes(spec, config.peft)
    world_size = config.parallel.dp_degree * config.parallel.sp_degree
    num_bytes = 0
    if config.deepspeed.offload_optimizer:
        num_bytes += sizes.num_trained // world_size * (4 * _FLOAT + ELEMENT_SIZES[config.model.dtype])
    if config.deepspeed.offload_params:
        num_bytes += sizes.num_weights // world_size * ELEMENT_SIZES[config.model.dtype]
    if config.train.activation_offload:
        num_bytes += spec.num_layers * max(layer.kept for layer in layers)
    return num_bytes
