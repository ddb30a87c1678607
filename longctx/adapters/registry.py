"""Adapter methods by name. None of their modules loads torch; what does is imported when an adapter is attached."""

from parallel.registry import Registry

ADAPTERS = Registry(
    "adapter",
    {
        "lora": "longctx.adapters.lora:LoRA",
        "dora": "longctx.adapters.dora:DoRA",
        "series": "longctx.adapters.series:SeriesAdapter",
        "parallel": "longctx.adapters.parallel:ParallelAdapter",
    },
)
