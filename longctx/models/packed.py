"""Runs a transformers decoder on packed tokens.

The weights, activation, norm and scale of every layer are taken from the loaded transformers modules; no family is
defined here. The loop over the layers is ours, because transformers' own cannot do three things that serving lives on:
one fused QKV and one fused gate-up product per layer, weights in oneDNN's blocked layout with the originals dropped,
and a dozen Python calls per layer where transformers makes over a hundred (a decode step of a small model is bound by
those). Taken from each layer: ``self_attn`` (``qkv_proj`` or ``q_proj``, ``k_proj``, ``v_proj``; ``o_proj``; ``q_norm``
and ``k_norm`` if there are; ``scaling``), ``mlp`` (``gate_up_proj`` or ``gate_proj``, ``up_proj``; ``down_proj``; the
activation), ``input_layernorm``, ``post_attention_layernorm``, and the ``adapter`` of either sublayer. Left out: layers
of any other form, training.

Shape legend: T tokens in the batch, C hidden size, R rows whose logits are wanted, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from longctx.attention.backend import AttentionBackend, HeadNorm
from longctx.attention.batch import AttentionShape, PackedBatch
from longctx.models.linear import Linear, make_linear
from longctx.models.loading import LoadedModel
from memory.layout import KVLayout
from memory.pages import DTYPES

Adapt = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # a sublayer's input and output [T, C] to its new output

_NORM_OFFSETS = {"gemma": 1.0}  # added to norm weights, which these families store around 0 instead of 1
_SILU = ("silu", "swish")


@dataclass(slots=True)
class _Layer:
    """One decoder layer's weights."""

    shape: AttentionShape
    qkv: Linear
    head_norm: HeadNorm | None
    output: Linear
    adapt_attention: Adapt | None  # a bottleneck adapter of the sublayer
    mlp_norm: torch.Tensor  # float32 [C]
    gate_up: Linear
    down: Linear
    adapt_mlp: Adapt | None
    next_norm: torch.Tensor  # float32 [C]: the next layer's first norm, or the final one


class PackedDecoder:
    """A decoder over packed tokens and paged KV.

    Args:
        loaded: from ``load_model``; its transformers model is taken apart and released.
        backend: the attention implementation; it also computes norms and SiLU.
    """

    def __init__(self, loaded: LoadedModel, backend: AttentionBackend) -> None:
        model: Any = loaded.model
        assert model is not None, "the loaded model was already taken apart"
        self.spec, self.dtype, self.device = loaded.spec, loaded.dtype, loaded.device
        self.backend, self.rotary = backend, loaded.rotary
        self.weight_bytes = 0  # read once per step whatever the batch; the embedding's look-up table is not
        self._eps = float(loaded.config.rms_norm_eps)
        self._norm_offset = _NORM_OFFSETS.get(loaded.spec.family, 0.0)
        self._activate = self._choose_activation(model.model.layers[0].mlp, loaded.config.hidden_act)
        layers = list(model.model.layers)
        norms = [self._take_norm(norm) for norm in (*(layer.input_layernorm for layer in layers), model.model.norm)]
        self._first_norm = norms[0]
        self._layers = [self._take_layer(idx, layer, norms[idx + 1]) for idx, layer in enumerate(layers)]
        embedding = model.model.embed_tokens
        self._embedding = embedding.weight.detach().to(self.device)
        scale = getattr(embedding, "scalar_embed_scale", None)
        # Rounded to the weights' dtype, as transformers does: a bf16 Gemma was trained with that value.
        self._embedding_scale = None if scale is None else float(torch.tensor(scale).to(self.dtype))
        self._head = self._take_head(model)
        loaded.release()

    def layout(self, page_size: int) -> KVLayout:
        """How this model's KV lies in pages of ``page_size`` tokens."""
        dtype = next(name for name, value in DTYPES.items() if value == self.dtype)
        spec = self.spec
        return KVLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim, page_size, dtype, self.backend.kv_order)

    @torch.inference_mode()
    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Compute the batch, store its KV, and return float32 logits ``[R, V]`` of ``batch.logit_rows_R``."""
        hidden_RC = self.hidden(batch)
        return self.logits(hidden_RC)

    @torch.inference_mode()
    def logits(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        """Float32 ``[R, V]`` of what ``hidden`` returned."""
        if hidden_RC.shape[0] == 0:
            return hidden_RC.new_empty(0, self.spec.vocab_size, dtype=torch.float32)
        logits_RV = self._head(hidden_RC).float()
        if self.spec.hidden_token_id is not None:
            logits_RV[:, self.spec.hidden_token_id] = float("-inf")
        return logits_RV

    @torch.inference_mode()
    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """As ``forward``, up to the output matrix: normalised ``[R, C]``."""
        batch = self.backend.lay_out(batch)
        attend, add_rms_norm, activate, eps = self.backend.forward, self.backend.add_rms_norm, self._activate, self._eps
        self.rotary.reserve(batch.max_kv_len)
        batch.cos_TD, batch.sin_TD = self.rotary.lookup(batch.positions_T, batch.rope_lens_T)
        x_TC = F.embedding(batch.input_ids_T, self._embedding)
        if self._embedding_scale is not None:
            x_TC = x_TC * self._embedding_scale
        normed_TC = self.backend.rms_norm(x_TC, self._first_norm, eps)
        last = self._layers[-1]
        for layer in self._layers:
            attended_TC = attend(layer.qkv(normed_TC), layer.head_norm, layer.shape, batch)
            if layer is last:
                # Nothing after the last layer's KV needs the other rows: for a prompt they are nearly all.
                x_TC = x_TC.index_select(0, batch.logit_rows_R)
                attended_TC = attended_TC.index_select(0, batch.logit_rows_R)
                if x_TC.shape[0] == 0:
                    return x_TC
            out_TC = layer.output(attended_TC)
            if layer.adapt_attention is not None:
                given_TC = normed_TC.index_select(0, batch.logit_rows_R) if layer is last else normed_TC
                out_TC = layer.adapt_attention(given_TC, out_TC)
            normed_TC = add_rms_norm(x_TC, out_TC, layer.mlp_norm, eps)
            out_TC = layer.down(activate(layer.gate_up(normed_TC)))
            if layer.adapt_mlp is not None:
                out_TC = layer.adapt_mlp(normed_TC, out_TC)
            normed_TC = add_rms_norm(x_TC, out_TC, layer.next_norm, eps)
        return normed_TC

    @property
    def attention_shapes(self) -> list[AttentionShape]:
        """Of every layer, in order."""
        return [layer.shape for layer in self._layers]

    def no_hidden(self) -> torch.Tensor:
        """What ``hidden`` returns for a batch that wants no logits."""
        return torch.empty((0, self._embedding.shape[1]), dtype=self.dtype, device=self.device)

    def _choose_activation(self, mlp: Any, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """``[T, 2 * I]`` (gate first) to ``[T, I]``: the backend's SiLU, or the transformers activation times up."""
        if name in _SILU:
            return self.backend.silu_mul
        function = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn

        def activate(gate_up_TC: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up_TC.chunk(2, dim=-1)
            return function(gate) * up

        return activate

    def _take_layer(self, layer_idx: int, layer: Any, next_norm: torch.Tensor) -> _Layer:
        attention, mlp, spec = layer.self_attn, layer.mlp, self.spec
        qkv = _pick(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
        gate_up = _pick(mlp, "gate_up_proj", ("gate_proj", "up_proj"))
        head_norm = None
        if hasattr(attention, "q_norm"):
            head_norm = HeadNorm(self._take_norm(attention.q_norm), self._take_norm(attention.k_norm), self._eps)
        return _Layer(
            shape=AttentionShape(
                layer_idx=layer_idx,
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                scale=float(attention.scaling),
                window=spec.sliding_windows[layer_idx],
            ),
            qkv=self._take_linear(*qkv),
            head_norm=head_norm,
            output=self._take_linear(attention.o_proj),
            adapt_attention=self._take_adapter(attention),
            mlp_norm=self._take_norm(layer.post_attention_layernorm),
            gate_up=self._take_linear(*gate_up),
            down=self._take_linear(mlp.down_proj),
            adapt_mlp=self._take_adapter(mlp),
            next_norm=next_norm,
        )

    def _take_norm(self, norm: Any) -> torch.Tensor:
        return norm.weight.detach().float().to(self.device) + self._norm_offset

    def _take_linear(self, *modules: nn.Linear) -> Linear:
        """One linear layer out of several over the same input; theirs are emptied."""
        weight = _join([module.weight for module in modules]).to(self.device)
        biases = [module.bias for module in modules if module.bias is not None]
        assert len(biases) in (0, len(modules))
        for module in modules:
            module.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        self.weight_bytes += weight.numel() * weight.element_size()
        return make_linear(weight, _join(biases).to(self.device) if biases else None)

    def _take_adapter(self, sublayer: Any) -> Adapt | None:
        """The bottleneck adapter of a sublayer (``longctx/adapters/bottleneck_layer.py``), if it has one."""
        adapter = getattr(sublayer, "adapter", None)
        if adapter is None:
            return None
        function, reads_input = adapter.activation, adapter.reads_input
        down, up = self._take_linear(adapter.down), self._take_linear(adapter.up)

        def adapt(in_TC: torch.Tensor, out_TC: torch.Tensor) -> torch.Tensor:
            return out_TC + up(function(down(in_TC if reads_input else out_TC)))

        return adapt

    def _take_head(self, model: Any) -> Linear:
        """The output matrix. A tied one shares the look-up table's memory where ``make_linear`` makes no copy."""
        weight = model.lm_head.weight
        is_tied = weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        weight = self._embedding if is_tied else weight.detach().to(self.device)
        self.weight_bytes += weight.numel() * weight.element_size()
        return make_linear(weight)


def _pick(module: Any, fused: str, parts: tuple[str, ...]) -> list[nn.Linear]:
    return [getattr(module, fused)] if hasattr(module, fused) else [getattr(module, part) for part in parts]


def _join(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    tensors = [parameter.detach() for parameter in parameters]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
