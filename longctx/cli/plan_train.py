"""``longctx plan train``: whether a training run fits, how long its steps take, and what to change if it does not fit.

Nothing is loaded but config.json and the headers of weights. What is not configured of the machine is measured here.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from longctx.cli.plan_text import FILLED_SHARE, GIB, align, describe_parts
from longctx.cli.plan_train_config import PlanTrainConfig
from longctx.errors import ConfigError
from longctx.models.checkpoint import ModelSpec, inspect_checkpoint
from longctx.training.advice import advise, find_longest_context
from longctx.training.attention_choice import settle_attention
from longctx.training.config import TrainConfig
from longctx.training.memory_plan import MemoryPlan, plan_memory
from longctx.training.preflight import check_config
from longctx.training.time_plan import TimePlan, choose_links, plan_attention, plan_time
from parallel.links import LinkModel

if TYPE_CHECKING:
    from longctx.machine_limits import MachineLimits


@dataclass(frozen=True, slots=True)
class _Setting:
    """What every variant of the run is planned with."""

    spec: ModelSpec
    limits: "MachineLimits"
    links: LinkModel
    num_nodes: int

    def plan(self, config: TrainConfig) -> MemoryPlan:
        """The memory of the fullest rank."""
        windows = self.spec.sliding_windows
        window = None if None in windows else max(each for each in windows if each is not None)
        plan = plan_attention(self.spec, config, self.links, window=window, num_nodes=self.num_nodes)
        return plan_memory(self.spec, config, plan, device_type=self.limits.device_type)

    def fits(self, config: TrainConfig) -> bool:
        """Whether the run fits."""
        return self.has_room(self.plan(config))

    def has_room(self, memory: MemoryPlan) -> bool:
        """Whether a plan fits."""
        return memory.total <= FILLED_SHARE * self.limits.memory_bytes


def plan_train(config: PlanTrainConfig) -> int:
    """Print the plan; returns 0 if the run fits, else 1. Raises ``ConfigError``, ``CheckpointError`` as training."""
    check_config(config)
    spec = inspect_checkpoint(config.model.path, require_weights=False)
    from longctx.machine_limits import find_device_type, find_limits  # load torch: mistakes are told before
    from longctx.training.peak import choose_dtype

    dtype = choose_dtype(config.model.dtype, find_device_type(config.model.device))
    attention = settle_attention(config.attention, spec, context_length=config.train.context_length, peft=config.peft)
    config = replace(config, model=replace(config.model, dtype=dtype), attention=attention)
    world_size = config.parallel.dp_degree * config.parallel.sp_degree
    machine = replace(config.machine, peak_flops=config.machine.peak_flops or config.logger.peak_flops)
    limits = find_limits(machine, device_name=config.model.device, dtype=config.model.dtype, num_processes=world_size)
    try:
        links = choose_links(config, config.links, limits.peak_flops)
        setting = _Setting(spec, limits, links, machine.num_nodes)
        memory = setting.plan(config)
        time = plan_time(
            spec,
            config,
            links,
            peak_flops=limits.peak_flops,
            bytes_per_s=limits.bytes_per_s,
            device_type=limits.device_type,
            num_nodes=machine.num_nodes,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    lines = [
        _describe_run(setting, config),
        "",
        *_describe_memory(memory, setting),
        "",
        *_describe_time(time, limits.peak_flops * world_size),
        "",
        *_describe_limits(setting, config),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if setting.has_room(memory) else 1


def _describe_run(setting: _Setting, config: TrainConfig) -> str:
    parallel, what, spec = config.parallel, config.peft.method, setting.spec
    return (
        f"{spec.name} ({spec.num_parameters:,} weights, {config.model.dtype}, training "
        f"{'every weight' if what == 'none' else what}) on {parallel.dp_degree} x {parallel.sp_degree} ranks "
        f"({setting.limits.device_type}), ZeRO {config.deepspeed.zero_stage}, {config.train.batch_size} sequences of "
        f"{config.train.context_length:,} tokens a step"
    )


def _describe_memory(memory: MemoryPlan, setting: _Setting) -> Iterator[str]:
    yield f"memory of the fullest rank, when it is fullest ({memory.moment}):"
    yield from describe_parts(memory.parts)
    verdict = "fits" if setting.has_room(memory) else "does not fit"
    yield f"{verdict} into {setting.limits.memory_bytes / GIB:.1f} GiB, of which {FILLED_SHARE:.0%} may be filled"
    if memory.host_bytes:
        yield f"besides {memory.host_bytes / GIB:.1f} GiB of the host's memory for each rank"


def _describe_time(time: TimePlan, peak_flops: float) -> Iterator[str]:
    yield f"a step takes {time.total:.3g} s:"
    parts = {
        "matrix products": time.products,
        "attention": time.attention,
        "other activations": time.elementwise,
        "optimizer": time.optimizer,
        "attention's exchange": time.exchange,
        "gradients and weights": time.sharding,
    }
    yield from (f"  {line}" for line in align([(name, f"{value:.3g} s") for name, value in parts.items()]))
    yield f"{time.tokens_per_s:,.0f} tokens/s, {time.flops / time.total / peak_flops:.0%} of peak FLOP/s"
    yield f"{time.communication_share:.0%} of the step waits for other ranks"


def _describe_limits(setting: _Setting, config: TrainConfig) -> Iterator[str]:
    spec = setting.spec
    longest = find_longest_context(config, setting.fits)
    yield f"the longest context that fits is {longest:,} tokens" if longest else "no context fits"
    if longest > spec.max_context:
        yield f"  {spec.name} takes {spec.max_context:,} tokens as it is; model.rope_scaling or rope_theta stretch it"
    if not setting.fits(config):
        advice = advise(config, setting.fits, device_type=setting.limits.device_type)
        yield "what would fit: " + (" ".join(advice) if advice else "nothing that this knows; a smaller model")
