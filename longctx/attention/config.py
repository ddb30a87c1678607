"""What the ``attention`` group of serving and generating holds. No torch here."""

import logging
from dataclasses import dataclass, fields, replace

from longctx.errors import ConfigError
from longctx.models.attention_spec import AttentionSpec, CCASpec, LandmarkSpec
from longctx.models.checkpoint import ModelSpec
from parallel.option import option, parse_budget

logger = logging.getLogger(__name__)

METHODS = ("auto", "dense", "landmark", "cca")
GRANULARITIES = ("head_token", "token", "head")
DEFAULT_CCA = CCASpec(group_size=16, window=1024)  # of a checkpoint that was not trained with it: the paper's at 64K
CORE_OPTIONS = ("group_size", "window", "core_fetch")
LANDMARK_OPTIONS = ("top_k", "retrieval", "skip_below")
TIER_OPTIONS = ("blocks", "blocks_bytes", "blocks_folder")
BELOW_CONTEXTS, BELOW_SHARE = 2, 0.5  # blocks_bytes=auto: full contexts, at most that share of what is free
LENGTH_DEPENDENT = ("dynamic", "longrope")  # RoPE types


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
        "where blocks are: near (engine.kv_bytes), or below it, in host memory or a memory-mapped file (landmark); "
        "where groups are fetched from: host (also if near), file (cca with core_fetch)",
        choices=("near", "host", "file"),
    )
    blocks_bytes: str = option(
        "auto",
        "room for them below, in each rank of a worker; auto: two full contexts, if half of what is free will do",
        parse=parse_budget,
    )
    blocks_folder: str | None = option(None, "folder of the memory-mapped file; null: where temporary files go")
    skip_below: float = option(
        0.0,
        "retrieve nothing where landmarks would get less than this share of the weight (landmark)",
        minimum=0,
        maximum=1,
    )
    group_size: int | None = option(
        None, "cca: tokens that become one core; null: what the checkpoint was trained with, or 16", minimum=1
    )
    window: int | None = option(
        None, "cca: tokens that each query sees as they are; null: as in training, or 1024", minimum=1
    )
    core_fetch: int = option(
        0,
        "cca: groups that each head sees token by token, for each token those whose keys' bounds promise most; their "
        "tokens are kept below",
        minimum=0,
    )

    @property
    def below(self) -> str:
        """Where what is not near lies: host or file."""
        return "file" if self.blocks == "file" else "host"


def choose_method(config: AttentionConfig, spec: ModelSpec) -> AttentionSpec | None:
    """The method that ``spec`` is served with, with the sizes that are used; None: dense.

    Raises:
        ConfigError: if the checkpoint was trained for another one, or cannot be served with it.
    """
    trained = "dense" if spec.attention is None else spec.attention.name
    name = trained if config.name == "auto" else config.name
    if "landmark" in (name, trained) and name != trained:
        raise ConfigError(
            f"attention.name={config.name} is not allowed: {spec.name} was trained with {trained} attention; auto"
        )
    if isinstance(spec.attention, LandmarkSpec):
        _check_landmark(config, spec, spec.attention)
    if name != "cca":
        _refuse_options(config, CORE_OPTIONS, "cca", name)
    if name != "landmark":
        _refuse_options(config, LANDMARK_OPTIONS, "landmark", name)
    if name != "landmark" and not config.core_fetch:
        _refuse_options(config, TIER_OPTIONS, "landmark, or cca with attention.core_fetch", name)
    return _choose_cca(config, spec) if name == "cca" else spec.attention if name == "landmark" else None


def _refuse_options(config: AttentionConfig, names: tuple[str, ...], method: str, used: str) -> None:
    """Options that are not as they are by default, and are of another method."""
    for field in fields(AttentionConfig):
        value = getattr(config, field.name)
        if field.name in names and value != field.default:
            raise ConfigError(
                f"attention.{field.name}={value} is not allowed with {used} attention: it is for {method}"
            )


def _check_landmark(config: AttentionConfig, spec: ModelSpec, trained: LandmarkSpec) -> None:
    most = spec.max_context // (trained.block_size + 1) - 2
    if config.top_k > most:
        raise ConfigError(
            f"attention.top_k={config.top_k} is not allowed: at most {most}; {spec.name} takes {spec.max_context} "
            f"positions, where so many of {trained.block_size} tokens and a landmark fit before a token's own one"
        )
    if any(window is not None for window in spec.sliding_windows):
        raise ConfigError(f"{spec.name} has sliding windows, with which landmark attention is not supported")


def choose_sizes(spec: CCASpec, group_size: int | None, window: int | None) -> tuple[int, int]:
    """Group size and window, those of ``spec`` where None; raises ``ValueError`` if they do not go together."""
    group_size, window = group_size or spec.group_size, window or spec.window
    if window < group_size:
        raise ValueError(
            f"attention.window={window} is not allowed with attention.group_size={group_size}: a window holds at "
            "least one group"
        )
    return group_size, window


def warn_untrained(method: AttentionSpec | None, spec: ModelSpec) -> None:
    """Say in the log if a checkpoint is served with another method than it was trained with."""
    used, trained = (("dense" if one is None else one.name) for one in (method, spec.attention))
    if used != trained:
        logger.warning("%s was trained with %s attention and is served with %s", spec.name, trained, used)


def _choose_cca(config: AttentionConfig, spec: ModelSpec) -> CCASpec:
    trained = spec.attention if isinstance(spec.attention, CCASpec) else DEFAULT_CCA
    if any(window is not None for window in spec.sliding_windows):
        raise ConfigError(f"attention.name=cca is not allowed: {spec.name} has sliding windows; dense")
    if spec.rope_type in LENGTH_DEPENDENT:
        raise ConfigError(
            f"attention.name=cca is not allowed: {spec.name} has RoPE of type {spec.rope_type}, whose angles depend on "
            "a sequence's length; dense"
        )
    try:
        group_size, window = choose_sizes(trained, config.group_size, config.window)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return replace(trained, group_size=group_size, window=window)
