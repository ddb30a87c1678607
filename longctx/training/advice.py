"""What to change so that a run fits into its memory, and the longest context that does. No torch here."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from longctx.training.config import TrainConfig

Fits = Callable[[TrainConfig], bool]
CONTEXT_STEP = 1024  # tokens that the longest context is a multiple of
_MAX_DOUBLINGS = 24
_LOSS_TILE, _MLP_TILE = 1024, 2048
_MAX_SP_DEGREE = 64


def list_savings(config: TrainConfig, *, device_type: str) -> Iterator[tuple[str, TrainConfig]]:
    """Changes that save memory, those that cost least first, each on top of those before it."""
    train = config.train
    if not train.activation_checkpointing:
        config = replace(config, train=replace(config.train, activation_checkpointing=True))
        yield "train.activation_checkpointing=true", config
    if not train.loss_tile or train.loss_tile > _LOSS_TILE:
        config = replace(config, train=replace(config.train, loss_tile=_LOSS_TILE))
        yield f"train.loss_tile={_LOSS_TILE}", config
    if not train.mlp_tile or train.mlp_tile > _MLP_TILE:
        config = replace(config, train=replace(config.train, mlp_tile=_MLP_TILE))
        yield f"train.mlp_tile={_MLP_TILE}", config
    if config.parallel.dp_degree * config.parallel.sp_degree > 1:
        for stage in range(config.deepspeed.zero_stage + 1, 4):
            config = replace(config, deepspeed=replace(config.deepspeed, zero_stage=stage))
            yield f"deepspeed.zero_stage={stage}", config
    if config.model.dtype == "float32":
        config = replace(config, model=replace(config.model, dtype="bfloat16"))
        yield "model.dtype=bfloat16", config
    if device_type == "cuda" and not config.deepspeed.offload_optimizer and config.deepspeed.zero_stage:
        config = replace(config, deepspeed=replace(config.deepspeed, offload_optimizer=True))
        yield "deepspeed.offload_optimizer=true", config
    if not train.activation_offload:
        config = replace(config, train=replace(config.train, activation_offload=True))
        yield "train.activation_offload=true", config
    if config.peft.method == "none":
        config = replace(config, peft=replace(config.peft, method="lora"))
        yield "peft.method=lora", config
    while 2 * config.parallel.sp_degree <= _MAX_SP_DEGREE:
        config = replace(config, parallel=replace(config.parallel, sp_degree=2 * config.parallel.sp_degree))
        yield f"parallel.sp_degree={config.parallel.sp_degree}", config


def advise(config: TrainConfig, fits: Fits, *, device_type: str) -> list[str] | None:
    """Overrides with which the run fits, without those that are not needed; None if none of them is enough."""
    taken: list[str] = []
    steps = list(list_savings(config, device_type=device_type))
    for override, changed in steps:
        taken.append(override)
        if fits(changed):
            return _drop_unneeded(config, taken, fits, device_type)
    return None


def find_longest_context(config: TrainConfig, fits: Fits) -> int:
    """Tokens, a multiple of ``CONTEXT_STEP``; 0 if not even that fits."""

    def fits_length(num_steps: int) -> bool:
        return fits(with_context(config, num_steps * CONTEXT_STEP))

    low, high = 0, 1
    while fits_length(high) and high < 1 << _MAX_DOUBLINGS:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits_length(middle) else (low, middle)
    return low * CONTEXT_STEP


def with_context(config: TrainConfig, length: int) -> TrainConfig:
    """The same run with sequences of ``length`` tokens."""
    return replace(config, train=replace(config.train, context_length=length))


def _drop_unneeded(config: TrainConfig, taken: list[str], fits: Fits, device_type: str) -> list[str]:
    """Leave changes out, the costliest first, as long as the rest is enough; of one key the last value counts."""
    needed = list({text.partition("=")[0]: text for text in taken}.values())
    for text in reversed(needed[:-1]):
        rest = [each for each in needed if each != text]
        if fits(apply_overrides(config, rest)):
            needed = rest
    return needed


def apply_overrides(config: TrainConfig, overrides: list[str]) -> TrainConfig:
    """The configuration with ``group.key=value`` set; values are as ``list_savings`` writes them."""
    for text in overrides:
        key, _, value = text.partition("=")
        group, _, name = key.partition(".")
        inner = getattr(config, group)
        kind = type(getattr(inner, name))
        config = replace(config, **{group: replace(inner, **{name: value == "true" if kind is bool else kind(value)})})
    return config
