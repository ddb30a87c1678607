"""Bytes of one decoder layer's activations on one rank, by what transformers' layers and ours save. No torch here.

What a layer saves for its backward is in two halves, attention's and the MLP's. The backward begins at the MLP, when
both are there, and reaches attention when the MLP's half is gone: a layer's peak is at one of these two places, each
with its own intermediates. In half precision a norm saves its input in float32 and what its weight multiplies in the
layer's dtype. Counts below are of whole tensors that are there at that place; they were checked against the allocator's
own record of a layer.
"""

from dataclasses import dataclass

from longctx.models.checkpoint import ModelSpec
from longctx.training.config import TrainConfig
from longctx.training.method_plan import count_method_memory
from longctx.training.model_sizes import is_target
from parallel.footprint import count_buffers
from parallel.plan import Plan

_FLOAT = 4  # bytes of what is accumulated


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of one layer."""

    kept: int  # between its forward and its backward
    live: int  # besides, at the peak of its backward
    forward: int  # besides, at the peak of its forward
    exchange: int  # of what attention sends, receives and adds up for others, and of landmarks, cores and their scores


def count_layer(spec: ModelSpec, config: TrainConfig, plan: Plan, *, rank: int, device_type: str) -> LayerMemory:
    """Of a rank of a sequence group.

    Args:
        spec, config: the run's.
        plan: of its attention.
        rank: within the sequence group.
        device_type: ``cpu`` or ``cuda``: attention's kernels differ.
    """
    tokens = Tokens(spec, config, plan.problem.num_q[rank], plan.problem.element_size)
    forward, backward = (count_buffers(plan, rank, backward=is_backward) for is_backward in (False, True))
    arrived = forward.kept
    saved = tokens.attention_saved + tokens.mlp_saved + arrived
    at_mlp = tokens.attention_saved + arrived + tokens.mlp_backward
    at_attention = tokens.attention_saved + arrived + tokens.attention_backward(device_type)
    exchange = max(forward.peak, backward.peak)
    exchange += count_method_memory(spec, config, tokens.num, device_type=device_type)
    if not config.train.activation_checkpointing:
        in_forward = max(tokens.mlp_forward, tokens.attention_forward(device_type))
        return LayerMemory(saved, max(at_mlp - saved, at_attention - saved, 0), in_forward, exchange)
    kept = tokens.hidden + (tokens.q + tokens.lse if config.train.keep_attention else 0)
    if config.train.activation_offload:
        return LayerMemory(0, max(at_mlp, at_attention), kept + tokens.attention_forward(device_type), exchange)
    in_forward = max(tokens.mlp_forward, tokens.attention_forward(device_type))
    return LayerMemory(kept, max(at_mlp, at_attention) - kept, in_forward, exchange)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tensors of a number of tokens in one layer."""

    spec: ModelSpec
    config: TrainConfig
    num: int
    element: int  # bytes

    @property
    def hidden(self) -> int:
        """One tensor of the hidden size."""
        return self.num * self.spec.hidden_size * self.element

    @property
    def q(self) -> int:
        """Queries, or attention's output."""
        return self.num * self.spec.num_heads * self.spec.head_dim * self.element

    @property
    def kv(self) -> int:
        """Keys and values."""
        return 2 * self.num * self.spec.num_kv_heads * self.spec.head_dim * self.element

    @property
    def lse(self) -> int:
        """Attention's log-sum-exp."""
        return self.num * self.spec.num_heads * _FLOAT

    @property
    def attention_saved(self) -> int:
        """The layer's input, its norm, q, k, v and attention's output."""
        unrounded = 0 if self.config.train.activation_checkpointing else self._wide(self.q)
        return self.hidden + self._attention_norm + self.q + self.kv + self.q + self.lse + unrounded

    @property
    def mlp_saved(self) -> int:
        """The norm with its input, and inner tensors: gate, its activation, up, and their product if that is read."""
        if self.config.train.mlp_tile:
            return self.hidden + self._mlp_norm
        return self.hidden + self._mlp_norm + (4 if self._saves_input("down_proj") else 3) * self._inner

    @property
    def mlp_backward(self) -> int:
        """What is there when the product's gradient has become those of its factors: six inner tensors."""
        around = 2 * self.hidden + self._mlp_norm  # the output's gradient, the norm with its input
        if not self.config.train.mlp_tile:
            return around + 6 * self._inner
        return around + self.hidden + 7 * self._inner_tile

    @property
    def mlp_forward(self) -> int:
        """Inputs and three inner tensors."""
        return 3 * self.hidden + 3 * (self._inner_tile if self.config.train.mlp_tile else self._inner)

    def attention_forward(self, device_type: str) -> int:
        """q, k, v before and after RoPE, the sums, a tile's output and what the kernel makes of its inputs."""
        given = self.hidden + self._attention_norm + self.q + self.kv
        sums = self._wide(self.q) + self.lse
        if device_type == "cuda":
            return given + sums + self.q
        return given + sums + 2 * self._wide(self.q) + self._converted

    def attention_backward(self, device_type: str) -> int:
        """Two gradients of the hidden size, sums of dq, dk and dv, and a tile's; beside what attention saved."""
        sums = self._wide(self.q) + self._wide(self.kv)
        gradients = self.hidden + self.q
        if device_type == "cuda":
            # An output with the given delta; a tile's gradients in the layer's dtype; the kernel's sum of dq, and its
            # dk and dv of every query head.
            repeated = 2 * self.q if self.spec.num_heads != self.spec.num_kv_heads else 0
            return gradients + sums + 2 * self.q + self.kv + self._wide(self.q) + repeated
        # a tile's gradients; the kernel's, of keys repeated for every query head; an output with the given delta
        return gradients + 2 * sums + 3 * self._wide(self.q) + 2 * self._wide(self.q) + self._converted

    @property
    def _attention_norm(self) -> int:
        is_read = self._saves_input("q_proj", "k_proj", "v_proj", "qkv_proj") or self._has_bottleneck("attention")
        return self._norm(is_read=is_read)

    @property
    def _mlp_norm(self) -> int:
        is_read = self._saves_input("gate_proj", "up_proj", "gate_up_proj") or self._has_bottleneck("mlp")
        return self._norm(is_read=is_read)

    def _norm(self, *, is_read: bool) -> int:
        """What a norm saves beside its input, and its output if that ``is_read`` in the backward too."""
        peft = self.config.peft
        multiplied = self.hidden if peft.method == "none" or peft.train_norms else 0
        unrounded = 0 if self.element == _FLOAT else self._wide(self.hidden)
        return unrounded + multiplied + (self.hidden if is_read else 0)

    def _saves_input(self, *linears: str) -> bool:
        """Whether one of these trains weights, its own or an adapter's."""
        peft = self.config.peft
        return peft.method == "none" or (
            peft.method in ("lora", "dora") and any(is_target(peft, linear) for linear in linears)
        )

    def _has_bottleneck(self, sublayer: str) -> bool:
        """Whether an adapter saves its input: a parallel one the norm's output, a series one the sublayer's."""
        peft = self.config.peft
        return peft.method in ("series", "parallel") and peft.sublayers in ("both", sublayer)

    @property
    def _inner(self) -> int:
        return self.num * self.spec.intermediate_size * self.element

    @property
    def _inner_tile(self) -> int:
        return min(self.num, self.config.train.mlp_tile) * self.spec.intermediate_size * self.element

    @property
    def _converted(self) -> int:
        """dO, q, k and v in float32, where they are not."""
        return 0 if self.element == _FLOAT else 2 * self._wide(self.q) + self._wide(self.kv)

    def _wide(self, num_bytes: int) -> int:
        """The same tensor in float32."""
        return num_bytes // self.element * _FLOAT
