"""DoRA (arXiv 2402.09353), through ``peft``: LoRA turns the rows, their lengths are trained apart."""

from longctx.adapters.low_rank import LowRankMethod


class DoRA(LowRankMethod):
    """A low-rank product added to frozen matrices, with a trained magnitude for each output."""

    name = "dora"
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector")
    use_dora = True
