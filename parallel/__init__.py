"""Sequence parallelism: layouts, masks as tiles, exchange plans and the executor that runs them; registries, options.

The lowest layer: it knows nothing of models, KV pools or Ray.
"""
