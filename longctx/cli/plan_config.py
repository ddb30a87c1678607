"""What ``longctx plan attention`` takes. No torch here."""

from dataclasses import dataclass, field

from parallel.links import LinkModel
from parallel.option import option
from parallel.plans import PLANS

LAYOUT_NAMES = ("contiguous", "zigzag", "striped", "balanced")
ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class PlanAttentionConfig:
    """One attention over a sharded sequence, and the links it runs over."""

    num_tokens: int = option(32768, "queries over all ranks", minimum=1)
    num_cached_tokens: int = option(0, "keys before them that have no queries: a cached prefix", minimum=0)
    batch_size: int = option(1, "sequences side by side", minimum=1)
    num_heads: int = option(32, "query heads", minimum=1)
    num_kv_heads: int = option(8, "KV heads; num_heads is a multiple", minimum=1)
    head_dim: int = option(128, "elements of a head", minimum=1)
    dtype: str = option("bfloat16", "of q, k and v", choices=tuple(ELEMENT_SIZES))
    causal: bool = option(True, "query i sees only keys j <= i")
    window: int | None = option(None, "query i sees only keys j with 0 <= i - j < window", minimum=1)
    documents: list[int] = option([], "lengths of packed documents, all keys in all; empty: one document")
    world_size: int = option(4, "ranks", minimum=1)
    num_nodes: int = option(1, "nodes that the ranks are spread over in order", minimum=1)
    layout: str = option("zigzag", "who holds which tokens", choices=LAYOUT_NAMES)
    plan: str = option("auto", "the plan to show step by step", choices=("auto", *PLANS))
    backward: bool = option(True, "plan for forward and backward")
    steps: bool = option(True, "print the plan step by step")
    picture: str | None = option(None, "file for a timeline picture, NAME.svg")
    links_file: str | None = option(None, "link model that longctx plan links wrote, in place of links.*")
    links: LinkModel = field(default_factory=LinkModel)
