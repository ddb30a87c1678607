"""What series and parallel adapters share: two matrices with an activation between, for each sublayer. No torch here.

LLM-Adapters (Hu et al. 2023, arXiv 2304.01933), section 3: with H_in and H_out the input and the output of a sublayer
(attention or MLP),

    series:    H_out <- H_out + f(H_out W_down) W_up
    parallel:  H_out <- H_out + f(H_in  W_down) W_up

both before the residual connection. Without biases and with tanh by default, as the authors' code has it; ``W_up``
begins at zero, as in He et al. (2022), so that a new adapter changes nothing. Left out: the authors' code also puts an
adapter beside each linear layer instead of the sublayer, which the paper's formulas do not have.
"""

from typing import TYPE_CHECKING

from longctx.adapters.config import ACTIVATIONS, PeftConfig
from longctx.adapters.method import ANY, AdapterMethod, Settings, Shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODULES = {"attention": ("self_attn",), "mlp": ("mlp",), "both": ("self_attn", "mlp")}
_LAST_MATRIX = {"self_attn": "o_proj", "mlp": "down_proj"}  # its rows are the hidden size


class BottleneckMethod(AdapterMethod):
    """Bottlenecks on sublayers; subclasses say what they read."""

    kinds = ("down", "up")
    is_merged = False
    reads_input: bool  # of the sublayer; else its output

    def describe(self, config: PeftConfig, shapes: Shapes) -> Settings:
        return {
            "bottleneck_size": config.bottleneck_size,
            "activation": config.activation,
            "dropout": config.dropout,
            "target_modules": list(_MODULES[config.sublayers]),
        }

    def refuse(self, settings: Settings) -> str | None:
        size, activation = settings.get("bottleneck_size"), settings.get("activation")
        targets = settings.get("target_modules")
        if not isinstance(size, int) or size < 1:
            return f"bottleneck_size={size!r} is not allowed: at least 1"
        if activation not in ACTIVATIONS:
            return f"activation={activation!r} is not allowed: one of {', '.join(ACTIVATIONS)}"
        if not isinstance(targets, list) or not targets or not set(targets) <= _LAST_MATRIX.keys():
            return f"target_modules={targets!r} is not allowed: some of {', '.join(_LAST_MATRIX)}"
        return None

    def expected_shape(self, name: str, shapes: Shapes) -> tuple[int, ...] | None:
        module, _, matrix = name.rpartition(".adapter.")
        last = _LAST_MATRIX.get(module.rpartition(".")[2])
        hidden_size = shapes.get(f"{module}.{last}.weight", (None,))[0]
        if hidden_size is None:
            return None
        return {"down.weight": (ANY, hidden_size), "up.weight": (hidden_size, ANY)}.get(matrix)

    def attach(self, model: "PreTrainedModel", settings: Settings) -> None:
        from longctx.adapters.bottleneck_layer import attach_bottlenecks

        attach_bottlenecks(model, settings, reads_input=self.reads_input)

    def file_name(self, parameter_name: str) -> str:
        return parameter_name
