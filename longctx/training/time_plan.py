"""How long a training step takes, from what its products, its attention and its messages take. No torch here."""

from pathlib import Path

from longctx.models.checkpoint import ModelSpec
from longctx.training.config import TrainConfig
from longctx.training.memory_plan import ELEMENT_SIZES
from parallel.links import LinkModel, load_links
from parallel.mask import Mask
from parallel.plan import Plan, make_problem
from parallel.planner import make_plan


def plan_attention(spec: ModelSpec, config: TrainConfig, links: LinkModel | None = None) -> Plan:
    """The exchange plan of a sequence of ``train.context_length`` tokens that is one document.

    Raises ``ValueError`` if ``parallel.plan`` cannot do it.
    """
    parallel, length = config.parallel, config.train.context_length
    problem = make_problem(
        Mask(True, spec.sliding_windows[0]),
        length,
        length,
        (spec.num_heads, spec.num_kv_heads, spec.head_dim),
        world_size=parallel.sp_degree,
        layout=parallel.layout,
        element_size=ELEMENT_SIZES[config.model.dtype],
    )
    if links is None:
        links = load_links(Path(parallel.links_file)) if parallel.links_file else LinkModel()
    keeps_results = config.train.activation_checkpointing and config.train.keep_attention
    return make_plan(parallel.plan, problem, links, backward=True, may_keep=not keeps_results)
