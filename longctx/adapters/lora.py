"""LoRA (arXiv 2106.09685), through ``peft``."""

from longctx.adapters.low_rank import LowRankMethod


class LoRA(LowRankMethod):
    """A low-rank product added to frozen matrices."""

    name = "lora"
    kinds = ("lora_A", "lora_B")
    use_dora = False
