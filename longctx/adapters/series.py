"""Series adapters (arXiv 2304.01933, section 3.1)."""

from longctx.adapters.bottleneck import BottleneckMethod


class SeriesAdapter(BottleneckMethod):
    """A bottleneck after a sublayer."""

    name = "series"
    peft_type = "SERIES_ADAPTER"
    reads_input = False
