"""What the ``peft`` group of ``longctx train`` holds. No torch here."""

from dataclasses import dataclass

from parallel.option import option

METHODS = ("none", "lora", "dora", "series", "parallel")
ACTIVATIONS = ("tanh", "relu", "gelu", "silu")
SUBLAYERS = ("both", "attention", "mlp")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """Which adapter is trained in place of the whole model."""

    method: str = option("none", "adapter to train; none: every weight", choices=METHODS)
    path: str | None = option(None, "adapter folder to go on from, whose shape is taken; null: a new adapter")
    rank: int = option(16, "of LoRA's and DoRA's matrices", minimum=1)
    alpha: float = option(32.0, "LoRA and DoRA scale their product by alpha / rank", above=0)
    bottleneck_size: int = option(64, "inner size of series and parallel adapters", minimum=1)
    activation: str = option("tanh", "between the two matrices of series and parallel adapters", choices=ACTIVATIONS)
    sublayers: str = option("both", "which sublayers get series and parallel adapters", choices=SUBLAYERS)
    dropout: float = option(0.0, "share of an adapter's inputs that is left out", minimum=0, maximum=0.99)
    target_modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "o_proj"], "linear layers that get LoRA or DoRA; all-linear: every one"
    )
    train_norms: bool = option(False, "norms are trained too, as LongLoRA does")
    train_embeddings: bool = option(False, "the embedding is trained too, as LongLoRA does")
