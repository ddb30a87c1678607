"""Parallel adapters (arXiv 2304.01933, section 3.1)."""

from longctx.adapters.bottleneck import BottleneckMethod


class ParallelAdapter(BottleneckMethod):
    """A bottleneck beside a sublayer."""

    name = "parallel"
    peft_type = "PARALLEL_ADAPTER"
    reads_input = True
