"""What the ``attention`` group of serving and generating holds. No torch here."""

from dataclasses import dataclass

from longctx.errors import ConfigError
from longctx.models.attention_spec import AttentionSpec, LandmarkSpec
from longctx.models.checkpoint import ModelSpec
from parallel.option import option, parse_budget

METHODS = ("auto", "dense", "landmark", "cca")
GRANULARITIES = ("head_token", "token", "head")


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Which attention method runs, and how it is used at inference."""

    name: str = option("auto", "attention method; auto: what the checkpoint was trained with", choices=METHODS)
    top_k: int = option(4, "blocks that a token retrieves (landmark)", minimum=1)
    retrieval: str = option(
        "head_token",
        "who chooses them: each head for each token, all heads together, or each head for a block of tokens (landmark)",
        choices=GRANULARITIES,
    )
    blocks: str = option(
        "near",
        "where blocks are: near (engine.kv_bytes), or below it, in host memory or a memory-mapped file (landmark)",
        choices=("near", "host", "file"),
    )
    blocks_bytes: str = option(
        "auto", "room for them below; auto: two full contexts, if half of what is free will do", parse=parse_budget
    )
    blocks_folder: str | None = option(None, "folder of the memory-mapped file; null: where temporary files go")
    skip_below: float = option(
        0.0,
        "retrieve nothing where landmarks would get less than this share of the weight (landmark)",
        minimum=0,
        maximum=1,
    )


def choose_method(config: AttentionConfig, spec: ModelSpec) -> AttentionSpec | None:
    """The method that ``spec`` is served with; None: dense.

    Raises:
        ConfigError: if the checkpoint was trained for another one.
    """
    trained = "dense" if spec.attention is None else spec.attention.name
    if config.name not in ("auto", trained):
        raise ConfigError(
            f"attention.name={config.name} is not allowed: {spec.name} was trained with {trained} attention; auto"
        )
    if isinstance(spec.attention, LandmarkSpec):
        _check_landmark(config, spec, spec.attention)
    elif spec.attention is not None:
        raise ConfigError(f"{spec.name} was trained with {trained} attention, which is not served yet")
    return spec.attention


def _check_landmark(config: AttentionConfig, spec: ModelSpec, trained: LandmarkSpec) -> None:
    most = spec.max_context // (trained.block_size + 1) - 2
    if config.top_k > most:
        raise ConfigError(
            f"attention.top_k={config.top_k} is not allowed: at most {most}; {spec.name} takes {spec.max_context} "
            f"positions, where so many of {trained.block_size} tokens and a landmark fit before a token's own one"
        )
    if any(window is not None for window in spec.sliding_windows):
        raise ConfigError(f"{spec.name} has sliding windows, with which landmark attention is not supported")
